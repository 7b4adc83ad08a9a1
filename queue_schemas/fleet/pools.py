"""Build the entries of ``/fabric/v1/pools``, for Routers and the Manager."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..ids import Pool
from ..lanes import LANES, Lane
from .messages import LaneDepth, PoolDepth, WorkerInfo


def describe_pools(
    depths: Mapping[Pool, Mapping[Lane, LaneDepth]], workers: Iterable[WorkerInfo], known: Iterable[str]
) -> list[PoolDepth]:
    """One entry per model that has jobs, is served, could be loaded or is ``known``, by name; every lane is in it,
    zeros included."""
    serving: dict[str, list[WorkerInfo]] = {}
    for worker in workers:
        if worker.is_present:
            for model in worker.loadable:
                serving.setdefault(model, [])
        if worker.takes_work:
            for model in worker.models:
                serving.setdefault(model, []).append(worker)
    models = sorted({*map(str, depths), *serving, *map(str, known)})
    slots = {model: [worker.slots for worker in serving.get(model, ())] for model in models}
    return [
        pool_depth(model, depths.get(Pool(model), {}), workers=len(slots[model]), slots=sum(slots[model]))
        for model in models
    ]


def pool_depth(model: str, depths: Mapping[Lane, LaneDepth], *, workers: int, slots: int) -> PoolDepth:
    """The entry of one model; a lane that is not in ``depths`` is empty."""
    lanes = {lane: depths.get(lane, LaneDepth()) for lane in LANES}
    waiting = sum(depth.waiting for depth in lanes.values())
    leased = sum(depth.leased for depth in lanes.values())
    return PoolDepth(
        model=model,
        waiting=waiting,
        leased=leased,
        outstanding=waiting + leased,
        oldest_age_ms=max(depth.oldest_age_ms for depth in lanes.values()),
        workers=workers,
        slots=slots,
        lanes=lanes,
    )
