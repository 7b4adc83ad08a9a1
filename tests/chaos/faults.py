"""How each fault of a plan is done to the fleet, and healed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from broker.scripts import load_scripts
from tests.support.disks import fill_disk, free_disk
from tests.support.faults import FaultProxy, Strike
from tests.support.fleet import Role
from tests.support.waiting import eventually

from .asks import HURRIED, MALFORMED, POISON
from .junk import junk
from .plan import LEASE_S, Fault, Kind
from .stage import Stage, up

STRIKE_LIMIT_S = 5.0
"""How long a strike waits for the operation that it is about."""
LOSSES_LIMIT_S = 3.0
LORIS_CLIENTS = 40
BURSTS = {HURRIED: (1_000, 60), MALFORMED: (30, 30), POISON: (1, 1)}
"""Requests, and how many of them at once, by kind."""
_SHA = {name: script.sha.encode() for name, script in load_scripts(flags=True).items()}

Deed = Callable[[Stage, int, Fault], Awaitable[None]]
"""Does one fault (its number, itself) and heals it."""


async def do(stage: Stage, number: int, fault: Fault) -> None:
    """Execute one fault and heal it. A process that another fault has in hand is left to it: the next one is taken."""
    async with _taken(stage, fault) as chosen:
        point = str(chosen.point) if chosen.call else ""
        stage.history.add(
            "fault", number=number, kind=str(chosen.kind), target=chosen.target, call=chosen.call, point=point
        )
        await _DEEDS[chosen.kind](stage, number, chosen)
        stage.history.add("healed", number=number)


@asynccontextmanager
async def _taken(stage: Stage, fault: Fault) -> AsyncIterator[Fault]:
    names = _processes(stage, fault.kind)
    if not names:
        yield fault
        return
    order = [(fault.target + step) % len(names) for step in range(len(names))]
    target = next((number for number in order if not stage.in_use[names[number]].locked()), order[0])
    async with stage.in_use[names[target]]:
        yield replace(fault, target=target)


def _processes(stage: Stage, kind: Kind) -> list[str]:
    """The processes of which a fault takes one for itself."""
    match kind:
        case Kind.KILL_WORKER | Kind.PAUSE_WORKER | Kind.DRAIN_WORKER | Kind.STRIKE_WORKER:
            return [worker.name for worker in stage.workers]
        case Kind.KILL_ROUTER | Kind.PAUSE_ROUTER | Kind.STRIKE_ROUTER:
            return [router.name for router in stage.routers]
        case Kind.KILL_MANAGER | Kind.PAUSE_MANAGER:
            return [manager.name for manager in stage.managers]
        case Kind.KILL_REDIS | Kind.PAUSE_REDIS | Kind.FULL_DISK | Kind.JUNK:
            return ["redis"]
        case _:
            return []


def _marker(call: str) -> bytes:
    """What a request of an operation has in it, on the wire."""
    return b"NOMKSTREAM\r\n$1\r\n*\r\n$1\r\nf\r\n" if call == "publish" else _SHA[call]


async def _again(role: Role) -> None:
    role.process.start()
    await up(role)


async def _kill_worker(stage: Stage, number: int, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    held = await stage.held_by(worker)
    stage.watch_recovery("kill", number, held)
    worker.process.kill()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def _kill_engine(stage: Stage, _number: int, fault: Fault) -> None:
    engine = engine_of(stage.workers[fault.target])
    if engine is not None:
        os.kill(engine, signal.SIGKILL)


def _kill(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.kill()
        await asyncio.sleep(fault.lasts_s)
        await _again(role)

    return deed


def _pause(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.pause()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            role.process.resume()

    return deed


async def _pause_worker(stage: Stage, number: int, fault: Fault) -> None:
    if fault.lasts_s > LEASE_S + 1:
        stage.watch_recovery("hang", number, await stage.held_by(stage.workers[fault.target]))
    await _pause(lambda stage: stage.workers)(stage, number, fault)


async def _pause_engine(stage: Stage, number: int, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    engine = engine_of(worker)
    if engine is None:
        return
    os.kill(engine, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)


async def _drain_worker(stage: Stage, _number: int, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    worker.process.send(signal.SIGTERM)
    await worker.ended()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def _kill_redis(stage: Stage, _number: int, fault: Fault) -> None:
    stage.server.kill()
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(stage.server.start)


async def _pause_redis(stage: Stage, _number: int, fault: Fault) -> None:
    stage.server.process.pause()
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        stage.server.process.resume()


async def _fill_disk(stage: Stage, _number: int, fault: Fault) -> None:
    fill_disk(stage.server)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        free_disk(stage.server)


def _cut(links: Callable[[Stage, int], Sequence[FaultProxy]], *, silently: bool = False) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        cut = links(stage, fault.target)
        for link in cut:
            (link.silence if silently else link.cut)()
        await asyncio.sleep(fault.lasts_s)
        for link in cut:
            link.heal()

    return deed


async def _slow(stage: Stage, _number: int, fault: Fault) -> None:
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.03
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.0


async def _slice(stage: Stage, _number: int, fault: Fault) -> None:
    for number, link in enumerate((*stage.router_links, *stage.worker_links)):
        link.slice_bytes = 1 + number % 7
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.slice_bytes = 0


async def _lose_replies(stage: Stage, _number: int, _fault: Fault) -> None:
    links = [*stage.router_links, *stage.worker_links]
    for link in links:
        for call in ("enqueue", "resume") if link in stage.router_links else ("settle", "claim", "publish"):
            link.lose_reply(_marker(call))
    # One that is never made loses nothing.
    with contextlib.suppress(AssertionError):
        await eventually(
            lambda: not any(link.losing for link in links), "replies are lost", limit_s=LOSSES_LIMIT_S, every_s=0.05
        )
    for link in links:
        link.keep_replies()


def _strike(roles: Callable[[Stage], Sequence[Role]], links: Callable[[Stage], Sequence[FaultProxy]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role, link = roles(stage)[fault.target], links(stage)[fault.target]
        struck = asyncio.Event()

        def kill() -> None:
            role.process.send(signal.SIGKILL)
            struck.set()

        link.strike(Strike(_marker(fault.call), fault.point, kill))
        try:
            async with asyncio.timeout(STRIKE_LIMIT_S):
                await struck.wait()
        except TimeoutError:
            link.strike(None)
            if not struck.is_set():
                return
        await asyncio.to_thread(role.process.wait, 10)
        await asyncio.sleep(fault.lasts_s)
        await _again(role)

    return deed


def _burst(kind: str) -> Deed:
    async def deed(stage: Stage, _number: int, _fault: Fault) -> None:
        assert stage.clients is not None
        await stage.clients.burst(kind, *BURSTS[kind])

    return deed


async def _loris(stage: Stage, _number: int, fault: Fault) -> None:
    assert stage.clients is not None
    await stage.clients.loris(LORIS_CLIENTS, fault.lasts_s)


async def _junk(stage: Stage, _number: int, fault: Fault) -> None:
    await junk(stage.server, fault.lasts_s)


def engine_of(worker: Role) -> int | None:
    """The process of a worker's engine: the child of its guard. None while there is none."""
    for guard in _children(worker.process.pid):
        for engine in _children(guard):
            return engine
    return None


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


_DEEDS: dict[Kind, Deed] = {
    Kind.KILL_WORKER: _kill_worker,
    Kind.KILL_ENGINE: _kill_engine,
    Kind.KILL_ROUTER: _kill(lambda stage: stage.routers),
    Kind.KILL_MANAGER: _kill(lambda stage: stage.managers),
    Kind.KILL_REDIS: _kill_redis,
    Kind.PAUSE_WORKER: _pause_worker,
    Kind.PAUSE_ENGINE: _pause_engine,
    Kind.PAUSE_ROUTER: _pause(lambda stage: stage.routers),
    Kind.PAUSE_MANAGER: _pause(lambda stage: stage.managers),
    Kind.PAUSE_REDIS: _pause_redis,
    Kind.DRAIN_WORKER: _drain_worker,
    Kind.CUT_WORKER: _cut(lambda stage, target: [stage.worker_links[target]]),
    Kind.CUT_ROUTER: _cut(lambda stage, target: [stage.router_links[target]]),
    Kind.CUT_FABRIC: _cut(lambda stage, target: stage.fabric_links[target]),
    Kind.SILENT_WORKER: _cut(lambda stage, target: [stage.worker_links[target]], silently=True),
    Kind.SILENT_ROUTER: _cut(lambda stage, target: [stage.router_links[target]], silently=True),
    Kind.SLOW_NETWORK: _slow,
    Kind.SLICED_NETWORK: _slice,
    Kind.LOSE_REPLIES: _lose_replies,
    Kind.STRIKE_WORKER: _strike(lambda stage: stage.workers, lambda stage: stage.worker_links),
    Kind.STRIKE_ROUTER: _strike(lambda stage: stage.routers, lambda stage: stage.router_links),
    Kind.FULL_DISK: _fill_disk,
    Kind.POISON: _burst(POISON),
    Kind.DISCONNECTS: _burst(HURRIED),
    Kind.STRANGERS: _burst(MALFORMED),
    Kind.LORIS: _loris,
    Kind.JUNK: _junk,
}
