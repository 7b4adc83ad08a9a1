"""What is done to connections, and to the disk below Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from broker.redis.scripts import load_scripts
from tests.support import disks
from tests.support.faults import FaultProxy
from tests.support.waiting import eventually

from .plan import Fault
from .stage import Deed, Stage

ROUTER_CALLS, WORKER_CALLS = ("enqueue",), ("settle", "claim", "publish", "append")
LOSSES_LIMIT_S = 5.0
"""How long replies wait for their calls, to be lost."""
_SHA = {name: script.sha.encode() for name, script in load_scripts(flags=True).items()}


def marker(call: str) -> bytes:
    """What a request of an operation has in it, on the wire."""
    return b"NOMKSTREAM\r\n$1\r\n*\r\n$1\r\nf\r\n" if call == "publish" else _SHA[call]


async def fill_disk(stage: Stage, _number: int, fault: Fault) -> None:
    disks.fill_disk(stage.server)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        disks.free_disk(stage.server)


def cut(links: Callable[[Stage, int], Sequence[FaultProxy]], *, silently: bool = False) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        cut = links(stage, fault.target)
        for link in cut:
            (link.silence if silently else link.cut)()
        await asyncio.sleep(fault.lasts_s)
        for link in cut:
            link.heal()

    return deed


async def slow(stage: Stage, _number: int, fault: Fault) -> None:
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.03
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.0


async def slices(stage: Stage, _number: int, fault: Fault) -> None:
    for number, link in enumerate((*stage.router_links, *stage.worker_links)):
        link.slice_bytes = 1 + number % 7
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.slice_bytes = 0


async def lose_replies(stage: Stage, _number: int, fault: Fault) -> None:
    """One of each call that any request makes; of a resume too, should there be one meanwhile."""
    armed = [(link, marker(call)) for link in stage.router_links for call in ROUTER_CALLS]
    armed += [(link, marker(call)) for link in stage.worker_links for call in WORKER_CALLS]
    rare = [(link, marker("resume")) for link in stage.router_links]
    for link, words in (*armed, *rare):
        link.lose_reply(words)
    # One that is never made loses nothing.
    with contextlib.suppress(AssertionError):
        await eventually(
            lambda: not any(link.loses(words) for link, words in armed), "lost", limit_s=LOSSES_LIMIT_S, every_s=0.05
        )
    await asyncio.sleep(fault.lasts_s)
    for link, _ in armed:
        link.keep_replies()
