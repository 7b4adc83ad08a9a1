"""From a seed to the faults of a run, and when. Pure: the same seed and length give the same plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.support.faults import Point

WORKERS, ROUTERS, MANAGERS = 3, 2, 2
CALM_S = 2.0
"""Before the first fault and after the last one."""


class Kind(StrEnum):
    KILL_WORKER = "SIGKILL worker"
    KILL_ENGINE = "SIGKILL engine"
    KILL_ROUTER = "SIGKILL router"
    KILL_MANAGER = "SIGKILL manager"
    KILL_REDIS = "SIGKILL redis"
    PAUSE_WORKER = "SIGSTOP worker"
    PAUSE_ENGINE = "SIGSTOP engine"
    PAUSE_ROUTER = "SIGSTOP router"
    PAUSE_MANAGER = "SIGSTOP manager"
    DRAIN_WORKER = "SIGTERM worker"
    CUT_WORKER = "worker cut off from redis"
    CUT_ROUTER = "router cut off from redis"
    SILENT_WORKER = "worker's packets to redis vanish"
    SLOW_NETWORK = "latency"
    SLICED_NETWORK = "bytes in slices of one to seven"
    LOSE_REPLIES = "replies of enqueue, claim, settle and publish lost after commit"
    STRIKE = "SIGKILL worker at a named point"
    DISCONNECTS = "a burst of clients that leave"
    STRANGERS = "a burst of malformed requests"


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``at_s``, for ``lasts_s``: ``kind`` on the ``target``-th of its role. ``call`` is the operation that a
    strike is about."""

    at_s: float
    kind: Kind
    target: int = 0
    lasts_s: float = 0.0
    call: str = ""
    point: Point = Point.AFTER_COMMIT

    def __str__(self) -> str:
        about = f", {self.call} {self.point}" if self.call else ""
        return f"{self.at_s:6.2f} s: {self.kind}{about}, number {self.target}, for {self.lasts_s:.1f} s"


_TARGETS = {"router": ROUTERS, "manager": MANAGERS, "worker": WORKERS, "engine": WORKERS}
_LASTS_S: dict[Kind, tuple[float, float]] = {
    Kind.KILL_WORKER: (0.3, 1.0),
    Kind.KILL_ROUTER: (0.3, 1.0),
    Kind.KILL_MANAGER: (0.5, 3.0),
    Kind.KILL_REDIS: (0.1, 0.8),
    Kind.PAUSE_WORKER: (1.0, 5.5),
    Kind.PAUSE_ENGINE: (5.0, 7.0),
    Kind.PAUSE_ROUTER: (0.5, 2.5),
    Kind.PAUSE_MANAGER: (0.5, 4.0),
    Kind.DRAIN_WORKER: (0.5, 1.0),
    Kind.CUT_WORKER: (0.5, 4.5),
    Kind.CUT_ROUTER: (0.3, 2.0),
    Kind.SILENT_WORKER: (0.5, 4.5),
    Kind.SLOW_NETWORK: (1.0, 3.0),
    Kind.SLICED_NETWORK: (1.0, 2.0),
    Kind.STRIKE: (0.3, 1.0),
}
_STRIKES = ("claim", "publish", "settle")
_ALWAYS = (
    Kind.KILL_WORKER,
    Kind.PAUSE_WORKER,
    Kind.LOSE_REPLIES,
    Kind.KILL_ENGINE,
    Kind.STRIKE,
    Kind.KILL_REDIS,
    Kind.KILL_ROUTER,
    Kind.SLICED_NETWORK,
    Kind.KILL_MANAGER,
    Kind.CUT_WORKER,
    Kind.DISCONNECTS,
    Kind.PAUSE_ENGINE,
    Kind.STRANGERS,
)
"""In every run that is long enough for them; drawn ones fill it."""


def draw(seed: int, seconds: float, every_s: float = 2.0) -> Sequence[Fault]:
    """The faults of a run of ``seconds``, one about every ``every_s``, in order of time."""
    rng = random.Random(seed)
    count = max(1, int((seconds - 2 * CALM_S) / every_s))
    always = list(_ALWAYS)
    rng.shuffle(always)
    kinds = [*always, *(rng.choice(list(Kind)) for _ in range(count))][:count]
    faults = []
    for number, kind in enumerate(kinds):
        at_s = CALM_S + (number + rng.uniform(0.0, 0.8)) * every_s
        least, most = _LASTS_S.get(kind, (0.0, 0.0))
        targets = next((n for role, n in _TARGETS.items() if role in kind), WORKERS)
        call = rng.choice(_STRIKES) if kind is Kind.STRIKE else ""
        faults.append(
            Fault(at_s, kind, rng.randrange(targets), rng.uniform(least, most), call, rng.choice(list(Point)))
        )
    return faults
