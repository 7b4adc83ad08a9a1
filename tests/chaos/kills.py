"""What is done to processes: killed, stopped for a while, drained, struck at a named point."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.faults import FaultProxy, Strike
from tests.support.fleet import Role

from .plan import LEASE_S, Fault
from .stage import Deed, Stage, up
from .wires import marker

STRIKE_LIMIT_S = 5.0
"""How long a strike waits for the operation that it is about."""


async def _again(role: Role) -> None:
    role.process.start()
    await up(role)


async def kill_worker(stage: Stage, number: int, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    held = await stage.held_by(worker)
    stage.watch_recovery("kill", number, held)
    worker.process.kill()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def kill_engine(stage: Stage, _number: int, fault: Fault) -> None:
    engine = engine_of(stage.workers[fault.target])
    if engine is not None:
        os.kill(engine, signal.SIGKILL)


def kill(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.kill()
        await asyncio.sleep(fault.lasts_s)
        await _again(role)

    return deed


def pause(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.pause()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            role.process.resume()

    return deed


async def pause_worker(stage: Stage, number: int, fault: Fault) -> None:
    if fault.lasts_s > LEASE_S + 1:
        stage.watch_recovery("hang", number, await stage.held_by(stage.workers[fault.target]))
    await pause(lambda stage: stage.workers)(stage, number, fault)


async def pause_engine(stage: Stage, number: int, fault: Fault) -> None:
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


async def drain_worker(stage: Stage, _number: int, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    worker.process.send(signal.SIGTERM)
    await worker.ended()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def kill_redis(stage: Stage, _number: int, fault: Fault) -> None:
    stage.server.kill()
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(stage.server.start)


async def pause_redis(stage: Stage, _number: int, fault: Fault) -> None:
    stage.server.process.pause()
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        stage.server.process.resume()


def strike(roles: Callable[[Stage], Sequence[Role]], links: Callable[[Stage], Sequence[FaultProxy]]) -> Deed:
    async def deed(stage: Stage, _number: int, fault: Fault) -> None:
        role, link = roles(stage)[fault.target], links(stage)[fault.target]
        struck = asyncio.Event()

        def kill() -> None:
            role.process.send(signal.SIGKILL)
            struck.set()

        link.strike(Strike(marker(fault.call), fault.point, kill))
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
