"""Inject faults into processes: kill, pause, drain, or kill at a named point."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.example_worker import ExampleWorker
from tests.support.fault_proxy import FaultProxy, InjectedFault
from tests.support.fleet import Role

from .fleet import ChaosFleet, FaultAction, up
from .network import marker
from .plan import LEASE_S, Fault

STRIKE_LIMIT_S = 5.0
"""How long a strike waits for its operation."""


async def _restart(role: Role | ExampleWorker) -> None:
    role.process.start()
    await up(role)


async def kill_worker(fleet: ChaosFleet, number: int, fault: Fault) -> None:
    worker = fleet.all_workers[fault.target]
    held = await fleet.held_by(worker)
    fleet.measure_recovery("kill", number, held)
    worker.process.kill()
    await asyncio.sleep(fault.duration_s)
    await _restart(worker)


async def kill_engine(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    engine = engine_of(fleet.workers[fault.target])
    if engine is not None:
        os.kill(engine, signal.SIGKILL)


def kill(roles: Callable[[ChaosFleet], Sequence[Role]]) -> FaultAction:
    async def act(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
        role = roles(fleet)[fault.target]
        role.process.kill()
        await asyncio.sleep(fault.duration_s)
        await _restart(role)

    return act


async def kill_router_process(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    """One of the processes of a Router, which its parent starts again; none if the Router itself is down."""
    for process in _children(fleet.routers[fault.target].process.pid)[:1]:
        os.kill(process, signal.SIGKILL)
    await asyncio.sleep(fault.duration_s)


def pause(roles: Callable[[ChaosFleet], Sequence[Role | ExampleWorker]]) -> FaultAction:
    async def act(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
        role = roles(fleet)[fault.target]
        role.process.pause()
        try:
            await asyncio.sleep(fault.duration_s)
        finally:
            role.process.resume()

    return act


async def pause_router(fleet: ChaosFleet, number: int, fault: Fault) -> None:
    """With all its processes."""
    processes = _children(fleet.routers[fault.target].process.pid)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
    try:
        await pause(lambda fleet: fleet.routers)(fleet, number, fault)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


async def pause_worker(fleet: ChaosFleet, number: int, fault: Fault) -> None:
    if fault.duration_s > LEASE_S + 1:
        fleet.measure_recovery("hang", number, await fleet.held_by(fleet.all_workers[fault.target]))
    await pause(lambda fleet: fleet.all_workers)(fleet, number, fault)


async def pause_engine(fleet: ChaosFleet, number: int, fault: Fault) -> None:
    worker = fleet.workers[fault.target]
    engine = engine_of(worker)
    if engine is None:
        return
    os.kill(engine, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.duration_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)


async def drain_worker(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    worker = fleet.all_workers[fault.target]
    worker.process.send(signal.SIGTERM)
    await worker.ended()
    await asyncio.sleep(fault.duration_s)
    await _restart(worker)


async def kill_redis(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    fleet.server.kill()
    await asyncio.sleep(fault.duration_s)
    await asyncio.to_thread(fleet.server.start)


async def pause_redis(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    fleet.server.process.pause()
    try:
        await asyncio.sleep(fault.duration_s)
    finally:
        fleet.server.process.resume()


def strike(
    roles: Callable[[ChaosFleet], Sequence[Role]], links: Callable[[ChaosFleet], Sequence[FaultProxy]]
) -> FaultAction:
    async def act(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
        role, link = roles(fleet)[fault.target], links(fleet)[fault.target]
        struck = asyncio.Event()

        def kill() -> None:
            role.process.send(signal.SIGKILL)
            struck.set()

        link.inject(InjectedFault(marker(fault.call), fault.point, kill))
        try:
            async with asyncio.timeout(STRIKE_LIMIT_S):
                await struck.wait()
        except TimeoutError:
            link.inject(None)
            if not struck.is_set():
                return
        await asyncio.to_thread(role.process.wait, 10)
        await asyncio.sleep(fault.duration_s)
        await _restart(role)

    return act


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
