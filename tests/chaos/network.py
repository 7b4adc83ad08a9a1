"""Inject faults into connections, and into the disk of Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from broker.redis.scripts import load_scripts
from tests.support import disks
from tests.support.fault_proxy import FaultProxy
from tests.support.waiting import eventually

from .fleet import ChaosFleet, FaultAction
from .plan import Fault

ROUTER_CALLS, WORKER_CALLS = ("enqueue",), ("settle", "claim", "publish")
LOSSES_LIMIT_S = 5.0
"""How long to wait for the calls whose replies are to be lost."""
_SHA = {name: script.sha.encode() for name, script in load_scripts(flags=True).items()}


def marker(call: str) -> bytes:
    """The bytes that identify a request of an operation on the wire."""
    return b"NOMKSTREAM\r\n$1\r\n*\r\n$1\r\nf\r\n" if call == "publish" else _SHA[call]


async def fill_disk(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    disks.fill_disk(fleet.server)
    try:
        await asyncio.sleep(fault.duration_s)
    finally:
        disks.free_disk(fleet.server)


def cut(links: Callable[[ChaosFleet, int], Sequence[FaultProxy]], *, silently: bool = False) -> FaultAction:
    async def act(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
        cut = links(fleet, fault.target)
        for link in cut:
            (link.silence if silently else link.cut)()
        await asyncio.sleep(fault.duration_s)
        for link in cut:
            link.heal()

    return act


async def slow(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    for link in (*fleet.router_links, *fleet.worker_links):
        link.latency_s = 0.03
    await asyncio.sleep(fault.duration_s)
    for link in (*fleet.router_links, *fleet.worker_links):
        link.latency_s = 0.0


async def slices(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    for number, link in enumerate((*fleet.router_links, *fleet.worker_links)):
        link.slice_bytes = 1 + number % 7
    await asyncio.sleep(fault.duration_s)
    for link in (*fleet.router_links, *fleet.worker_links):
        link.slice_bytes = 0


async def lose_replies(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    """Lose one reply of each call that every request makes, and one of a resume if there is one."""
    armed = [(link, marker(call)) for link in fleet.router_links for call in ROUTER_CALLS]
    armed += [(link, marker(call)) for link in fleet.worker_links for call in WORKER_CALLS]
    rare = [(link, marker("resume")) for link in fleet.router_links]
    for link, words in (*armed, *rare):
        link.lose_reply(words)
    # A call that is never made loses nothing.
    with contextlib.suppress(AssertionError):
        await eventually(
            lambda: not any(link.loses(words) for link, words in armed), "lost", limit_s=LOSSES_LIMIT_S, every_s=0.05
        )
    await asyncio.sleep(fault.duration_s)
    for link, _ in armed:
        link.keep_replies()
