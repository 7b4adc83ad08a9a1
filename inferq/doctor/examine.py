"""Run every check in order and collect the findings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from queue_schemas import CannotStart

from .batches import check_batches
from .fabric import check_engine, check_fabric
from .findings import DoctorTarget, Finding, Level
from .host import check_disk, check_files, check_ports, check_python, check_settings
from .managers import check_managers
from .queue import check_queue
from .ray import check_ray
from .store import check_store
from .webhooks import check_webhooks

_CHECK_LIMIT_S = 15.0


async def examine(examined: DoctorTarget) -> list[Finding]:
    """Every finding, in the order in which a person would want to read them. Never raises for what it finds."""
    checks: list[tuple[str, Callable[[], Awaitable[Sequence[Finding]]]]] = [
        ("python", check_python),
        ("settings", check_settings),
        ("queue", lambda: check_queue(examined)),
        ("ports", check_ports),
        ("managers", check_managers),
        ("engine", lambda: check_engine(examined)),
        ("files", check_files),
        ("disk", lambda: check_disk(examined)),
        ("store", lambda: check_store(examined)),
        ("ray", lambda: check_ray(examined)),
        ("fabric", lambda: check_fabric(examined)),
        ("batches", lambda: check_batches(examined)),
        ("webhooks", lambda: check_webhooks(examined)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            async with asyncio.timeout(_CHECK_LIMIT_S):
                findings += await check()
        except CannotStart:
            continue  # a setting is wrong: the check of the settings reports it
        except TimeoutError:
            findings.append(
                Finding(name, Level.FAILURE, f"no result within {_CHECK_LIMIT_S:.0f} s", "look at the host")
            )
    return findings
