"""How each fault of a plan is done to the fleet, and healed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from . import kills, wires
from .asks import HURRIED, MALFORMED, POISON
from .junk import junk
from .plan import Fault, Kind
from .stage import Deed, Stage

LORIS_CLIENTS = 40
BURSTS = {HURRIED: (1_000, 60), MALFORMED: (30, 30), POISON: (1, 1)}
"""Requests, and how many of them at once, by kind."""


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


_DEEDS: dict[Kind, Deed] = {
    Kind.KILL_WORKER: kills.kill_worker,
    Kind.KILL_ENGINE: kills.kill_engine,
    Kind.KILL_ROUTER: kills.kill(lambda stage: stage.routers),
    Kind.KILL_MANAGER: kills.kill(lambda stage: stage.managers),
    Kind.KILL_REDIS: kills.kill_redis,
    Kind.PAUSE_WORKER: kills.pause_worker,
    Kind.PAUSE_ENGINE: kills.pause_engine,
    Kind.PAUSE_ROUTER: kills.pause(lambda stage: stage.routers),
    Kind.PAUSE_MANAGER: kills.pause(lambda stage: stage.managers),
    Kind.PAUSE_REDIS: kills.pause_redis,
    Kind.DRAIN_WORKER: kills.drain_worker,
    Kind.CUT_WORKER: wires.cut(lambda stage, target: [stage.worker_links[target]]),
    Kind.CUT_ROUTER: wires.cut(lambda stage, target: [stage.router_links[target]]),
    Kind.CUT_FABRIC: wires.cut(lambda stage, target: stage.fabric_links[target]),
    Kind.SILENT_WORKER: wires.cut(lambda stage, target: [stage.worker_links[target]], silently=True),
    Kind.SILENT_ROUTER: wires.cut(lambda stage, target: [stage.router_links[target]], silently=True),
    Kind.SLOW_NETWORK: wires.slow,
    Kind.SLICED_NETWORK: wires.slices,
    Kind.LOSE_REPLIES: wires.lose_replies,
    Kind.STRIKE_WORKER: kills.strike(lambda stage: stage.workers, lambda stage: stage.worker_links),
    Kind.STRIKE_ROUTER: kills.strike(lambda stage: stage.routers, lambda stage: stage.router_links),
    Kind.FULL_DISK: wires.fill_disk,
    Kind.POISON: _burst(POISON),
    Kind.DISCONNECTS: _burst(HURRIED),
    Kind.STRANGERS: _burst(MALFORMED),
    Kind.LORIS: _loris,
    Kind.JUNK: _junk,
}
