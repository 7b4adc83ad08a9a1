"""Every look, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from queue_schemas import CannotStart

from .batches import look_at_batches
from .fabric import look_at_engine, look_at_fabric
from .findings import Examined, Finding, Level
from .host import look_at_disk, look_at_files, look_at_ports, look_at_python, look_at_settings
from .managers import look_at_managers
from .queue import look_at_queue
from .ray import look_at_ray
from .store import look_at_store
from .webhooks import look_at_webhooks

_CHECK_LIMIT_S = 15.0


async def examine(examined: Examined) -> list[Finding]:
    """Every finding, in the order in which a person would want to read them. Never raises for what it finds."""
    checks: list[tuple[str, Callable[[], Awaitable[Sequence[Finding]]]]] = [
        ("python", look_at_python),
        ("settings", look_at_settings),
        ("queue", lambda: look_at_queue(examined)),
        ("ports", look_at_ports),
        ("managers", look_at_managers),
        ("engine", lambda: look_at_engine(examined)),
        ("files", look_at_files),
        ("disk", lambda: look_at_disk(examined)),
        ("store", lambda: look_at_store(examined)),
        ("ray", lambda: look_at_ray(examined)),
        ("fabric", lambda: look_at_fabric(examined)),
        ("batches", lambda: look_at_batches(examined)),
        ("webhooks", lambda: look_at_webhooks(examined)),
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
