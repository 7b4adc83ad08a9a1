"""The figures of ``/fabric/v1/pools``, the same wherever they are served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .fabric import LaneDepth, PoolDepth, WorkerInfo
from .ids import Pool
from .lanes import LANES, Lane


def describe_pools(
    depths: Mapping[Pool, Mapping[Lane, LaneDepth]], workers: Iterable[WorkerInfo], known: Iterable[str]
) -> list[PoolDepth]:
    """One entry per model that has jobs, is served or is ``known``, by name; every lane is in it, zeros included."""
    serving: dict[str, list[WorkerInfo]] = {}
    for worker in workers:
        if worker.takes_work:
            for model in worker.models:
                serving.setdefault(model, []).append(worker)
    models = sorted({*map(str, depths), *serving, *map(str, known)})
    return [_describe(model, depths.get(Pool(model), {}), serving.get(model, ())) for model in models]


def _describe(model: str, depths: Mapping[Lane, LaneDepth], serving: Iterable[WorkerInfo]) -> PoolDepth:
    lanes = {lane: depths.get(lane, LaneDepth()) for lane in LANES}
    waiting = sum(depth.waiting for depth in lanes.values())
    leased = sum(depth.leased for depth in lanes.values())
    slots = [worker.slots for worker in serving]
    return PoolDepth(
        model=model,
        waiting=waiting,
        leased=leased,
        outstanding=waiting + leased,
        oldest_age_ms=max(depth.oldest_age_ms for depth in lanes.values()),
        workers=len(slots),
        slots=sum(slots),
        lanes=lanes,
    )
