"""Inject each fault of a plan into the fleet, and heal it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from . import network, processes
from .fleet import ChaosFleet, FaultAction
from .plan import REDIS_WORKERS, Fault, Kind
from .stream_garbage import write_garbage
from .workload import IMPATIENT, MALFORMED, POISON

SLOWLORIS_CLIENTS = 40
BURSTS = {IMPATIENT: (1_000, 60), MALFORMED: (30, 30), POISON: (1, 1)}
"""Requests, and how many of them at once, by kind."""


async def inject(fleet: ChaosFleet, number: int, fault: Fault) -> None:
    """Inject one fault and heal it. If another fault is using the process, take the next one."""
    async with _exclusive(fleet, fault) as chosen:
        point = str(chosen.point) if chosen.call else ""
        fleet.history.add(
            "fault", number=number, kind=str(chosen.kind), target=chosen.target, call=chosen.call, point=point
        )
        await _ACTIONS[chosen.kind](fleet, number, chosen)
        fleet.history.add("healed", number=number)


@asynccontextmanager
async def _exclusive(fleet: ChaosFleet, fault: Fault) -> AsyncIterator[Fault]:
    names = _processes(fleet, fault.kind)
    if not names:
        yield fault
        return
    order = [(fault.target + step) % len(names) for step in range(len(names))]
    target = next((number for number in order if not fleet.in_use[names[number]].locked()), order[0])
    async with fleet.in_use[names[target]]:
        yield replace(fault, target=target)


def _processes(fleet: ChaosFleet, kind: Kind) -> list[str]:
    """The processes of which a fault uses one exclusively."""
    match kind:
        case Kind.KILL_WORKER | Kind.PAUSE_WORKER | Kind.DRAIN_WORKER:
            return [worker.name for worker in fleet.all_workers]
        case Kind.STRIKE_WORKER:
            return [worker.name for worker in fleet.workers[:REDIS_WORKERS]]
        case Kind.KILL_ROUTER | Kind.PAUSE_ROUTER | Kind.STRIKE_ROUTER:
            return [router.name for router in fleet.routers]
        case Kind.KILL_MANAGER | Kind.PAUSE_MANAGER:
            return [manager.name for manager in fleet.managers]
        case Kind.KILL_REDIS | Kind.PAUSE_REDIS | Kind.FULL_DISK | Kind.STREAM_GARBAGE:
            return ["redis"]
        case _:
            return []


def _burst(kind: str) -> FaultAction:
    async def act(fleet: ChaosFleet, _number: int, _fault: Fault) -> None:
        assert fleet.clients is not None
        await fleet.clients.burst(kind, *BURSTS[kind])

    return act


async def _slowloris(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    assert fleet.clients is not None
    await fleet.clients.slowloris(SLOWLORIS_CLIENTS, fault.duration_s)


async def _write_garbage(fleet: ChaosFleet, _number: int, fault: Fault) -> None:
    await write_garbage(fleet.server, fault.duration_s)


_ACTIONS: dict[Kind, FaultAction] = {
    Kind.KILL_WORKER: processes.kill_worker,
    Kind.KILL_ENGINE: processes.kill_engine,
    Kind.KILL_ROUTER: processes.kill(lambda fleet: fleet.routers),
    Kind.KILL_PROCESS: processes.kill_router_process,
    Kind.KILL_MANAGER: processes.kill(lambda fleet: fleet.managers),
    Kind.KILL_REDIS: processes.kill_redis,
    Kind.PAUSE_WORKER: processes.pause_worker,
    Kind.PAUSE_ENGINE: processes.pause_engine,
    Kind.PAUSE_ROUTER: processes.pause_router,
    Kind.PAUSE_MANAGER: processes.pause(lambda fleet: fleet.managers),
    Kind.PAUSE_REDIS: processes.pause_redis,
    Kind.DRAIN_WORKER: processes.drain_worker,
    Kind.CUT_WORKER: network.cut(lambda fleet, target: [fleet.worker_links[target]]),
    Kind.CUT_ROUTER: network.cut(lambda fleet, target: [fleet.router_links[target]]),
    Kind.CUT_FABRIC: network.cut(lambda fleet, target: fleet.fabric_links[target]),
    Kind.SILENT_WORKER: network.cut(lambda fleet, target: [fleet.worker_links[target]], silently=True),
    Kind.SILENT_ROUTER: network.cut(lambda fleet, target: [fleet.router_links[target]], silently=True),
    Kind.SLOW_NETWORK: network.slow,
    Kind.SLICED_NETWORK: network.slices,
    Kind.LOSE_REPLIES: network.lose_replies,
    Kind.STRIKE_WORKER: processes.strike(lambda fleet: fleet.workers, lambda fleet: fleet.worker_links),
    Kind.STRIKE_ROUTER: processes.strike(lambda fleet: fleet.routers, lambda fleet: fleet.router_links),
    Kind.FULL_DISK: network.fill_disk,
    Kind.POISON: _burst(POISON),
    Kind.DISCONNECTS: _burst(IMPATIENT),
    Kind.MALFORMED: _burst(MALFORMED),
    Kind.SLOWLORIS: _slowloris,
    Kind.STREAM_GARBAGE: _write_garbage,
}
