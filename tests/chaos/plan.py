"""Draw the faults of a run and their times from a seed. Pure: the same seed and length give the same plan.

A run opens with what it measures and must prove: workers are killed, one is hung, replies are lost, a prompt crashes
its engines, each when the one before is over and nothing else is under way. Then every other kind of fault comes once,
in an order of the seed's, several at a time; then, in a long run, what the seed draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from tests.support.fault_proxy import Point

WORKERS, ROUTERS, MANAGERS = 3, 2, 2
REDIS_WORKERS = 2
"""Workers at Redis; the others have the queue over HTTP, as has one more, which is in Go."""
ALL_WORKERS = WORKERS + 1
EXAMPLE_WORKER = f"worker-{ALL_WORKERS}"
"""The one in Go: it begins a stream anew where ours go on behind what was said."""
LEASE_S, SWEEP_S = 3.0, 0.2
"""The fleet's lease, and how often the Manager sweeps."""
CALM_S = 2.0
"""Before the first fault and after the last one."""
OPENING_S = 22.0
"""About how long the opening takes."""
INTERVAL_S = 2.0
"""Between drawn faults, after each kind has come once."""
MIN_S = 40.0
"""A shorter run has no time for each kind, and need not prove anything."""


class Kind(StrEnum):
    KILL_WORKER = "SIGKILL worker"
    KILL_ENGINE = "SIGKILL engine"
    KILL_ROUTER = "SIGKILL router"
    KILL_PROCESS = "SIGKILL process of a router that has two"
    KILL_MANAGER = "SIGKILL manager"
    KILL_REDIS = "SIGKILL redis"
    PAUSE_WORKER = "SIGSTOP worker"
    PAUSE_ENGINE = "SIGSTOP engine"
    PAUSE_ROUTER = "SIGSTOP router"
    PAUSE_MANAGER = "SIGSTOP manager"
    PAUSE_REDIS = "SIGSTOP redis"
    DRAIN_WORKER = "SIGTERM worker"
    CUT_WORKER = "worker cut off from redis"
    CUT_ROUTER = "router cut off from redis"
    CUT_FABRIC = "worker cut off from every manager and router"
    SILENT_WORKER = "worker's packets to redis vanish"
    SILENT_ROUTER = "router's packets to redis vanish"
    SLOW_NETWORK = "latency"
    SLICED_NETWORK = "bytes in slices of one to seven"
    LOSE_REPLIES = "replies of enqueue, resume, claim, publish and settle lost after commit"
    STRIKE_WORKER = "SIGKILL worker at a named point"
    STRIKE_ROUTER = "SIGKILL router at a named point"
    FULL_DISK = "disk full"
    POISON = "a prompt that crashes its engine"
    DISCONNECTS = "clients that disconnect by the hundred"
    MALFORMED = "malformed, deep, truncated and oversized requests"
    SLOWLORIS = "clients that send byte by byte, or nothing"
    STREAM_GARBAGE = "garbage written into the streams"


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``at_s`` (counted from the end of the opening), for ``duration_s``: ``kind`` on the ``target``-th of its role.
    ``call`` is the operation that a strike is about."""

    at_s: float
    kind: Kind
    target: int = 0
    duration_s: float = 0.0
    call: str = ""
    point: Point = Point.AFTER_COMMIT


_TARGETS = {"process": 1, "router": ROUTERS, "manager": MANAGERS, "worker": WORKERS, "engine": WORKERS}
_DURATION_S: dict[Kind, tuple[float, float]] = {
    Kind.KILL_WORKER: (0.3, 1.0),
    Kind.KILL_ROUTER: (0.3, 1.0),
    Kind.KILL_PROCESS: (0.6, 1.0),
    Kind.KILL_MANAGER: (0.5, 3.0),
    Kind.KILL_REDIS: (0.1, 0.8),
    Kind.PAUSE_WORKER: (1.0, 5.5),
    Kind.PAUSE_ENGINE: (5.0, 7.0),
    Kind.PAUSE_ROUTER: (0.5, 2.5),
    Kind.PAUSE_MANAGER: (0.5, 4.0),
    Kind.PAUSE_REDIS: (0.3, 2.5),
    Kind.DRAIN_WORKER: (0.5, 1.0),
    Kind.CUT_WORKER: (0.5, 4.5),
    Kind.CUT_ROUTER: (0.3, 2.0),
    Kind.CUT_FABRIC: (1.0, 4.5),
    Kind.SILENT_WORKER: (0.5, 4.5),
    Kind.SILENT_ROUTER: (0.3, 2.0),
    Kind.SLOW_NETWORK: (1.0, 3.0),
    Kind.SLICED_NETWORK: (1.0, 2.0),
    Kind.LOSE_REPLIES: (0.5, 2.0),
    Kind.STRIKE_WORKER: (0.3, 1.0),
    Kind.STRIKE_ROUTER: (0.3, 1.0),
    Kind.FULL_DISK: (0.5, 1.5),
    Kind.SLOWLORIS: (1.0, 3.0),
    Kind.STREAM_GARBAGE: (0.5, 1.0),
}
_FEWER_OR_MORE = {
    **dict.fromkeys((Kind.CUT_WORKER, Kind.SILENT_WORKER, Kind.STRIKE_WORKER), REDIS_WORKERS),
    **dict.fromkeys((Kind.KILL_WORKER, Kind.PAUSE_WORKER, Kind.DRAIN_WORKER), ALL_WORKERS),
}
"""Targets of faults that not every worker of ours, or also one of another make, can meet."""
_WORKER_CALLS = ("claim", "publish", "settle")


def opening(seed: int, seconds: float) -> Sequence[Fault]:
    """The first faults, one after the other; none in a run that is too short."""
    if seconds < MIN_S:
        return []
    # Those at Redis: how soon a worker over HTTP is missed depends on its lease alone.
    first, second = _shuffled(random.Random(seed), list(range(REDIS_WORKERS)))
    return [
        Fault(0.0, Kind.KILL_WORKER, first, 0.3),
        Fault(0.0, Kind.PAUSE_WORKER, second, LEASE_S + 2.0),
        Fault(0.0, Kind.KILL_WORKER, REDIS_WORKERS, 0.3),
        Fault(0.0, Kind.LOSE_REPLIES),
        Fault(0.0, Kind.POISON),
    ]


def draw(seed: int, seconds: float) -> Sequence[Fault]:
    """The faults after the opening of a run of ``seconds``, in order of time."""
    rng = random.Random(seed)
    if seconds < MIN_S:
        kinds = _shuffled(rng, list(Kind))
        count = max(1, int((seconds - 2 * CALM_S) / INTERVAL_S))
        return _at(rng, kinds[:count], 0.0, INTERVAL_S)
    left_s = seconds - 2 * CALM_S - OPENING_S
    # Workers are struck at each call, and at each point.
    others = [kind for kind in Kind if kind not in (Kind.KILL_WORKER, Kind.PAUSE_WORKER, Kind.POISON)]
    once = _shuffled(rng, [*others, *[Kind.STRIKE_WORKER] * (len(_WORKER_CALLS) - 1)])
    every_s = min(INTERVAL_S, left_s / len(once))
    count = max(0, int((left_s - len(once) * every_s) / INTERVAL_S))
    drawn = [rng.choice(list(Kind)) for _ in range(count)]
    first = _at(rng, once, 0.0, every_s)
    strikes = [number for number, fault in enumerate(first) if fault.kind is Kind.STRIKE_WORKER]
    for number, call, point in zip(strikes, _WORKER_CALLS, _shuffled(rng, list(Point)), strict=True):
        first[number] = replace(first[number], call=call, point=point)
    return [*first, *_at(rng, drawn, len(once) * every_s, INTERVAL_S)]


_T = TypeVar("_T")


def _shuffled(rng: random.Random, things: list[_T]) -> list[_T]:
    rng.shuffle(things)
    return things


def _at(rng: random.Random, kinds: Sequence[Kind], from_s: float, every_s: float) -> list[Fault]:
    return [_fault(rng, kind, from_s + (number + rng.uniform(0.0, 0.8)) * every_s) for number, kind in enumerate(kinds)]


def _fault(rng: random.Random, kind: Kind, at_s: float) -> Fault:
    named = [role for role in _TARGETS if role in kind]
    targets = _FEWER_OR_MORE.get(kind) or (_TARGETS[min(named, key=kind.index)] if named else WORKERS)
    call = {Kind.STRIKE_WORKER: rng.choice(_WORKER_CALLS), Kind.STRIKE_ROUTER: "enqueue"}.get(kind, "")
    duration_s = rng.uniform(*_DURATION_S.get(kind, (0.0, 0.0)))
    return Fault(at_s, kind, rng.randrange(targets), duration_s, call, rng.choice(list(Point)))
