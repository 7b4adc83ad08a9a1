"""The directory: which models exist, and who serves them now. Built from what the queue's server knows of the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from queue_schemas import Lane, LaneDepth, Pool, PoolDepth, PoolList, WorkerInfo
from queue_schemas.pools import pool_depth


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """One model: ``workers`` that take work for it now, their ``slots`` and ``regions``, and when it was
    ``first_seen_s`` (Unix)."""

    workers: int
    slots: int
    first_seen_s: int
    regions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Directory:
    """All models: served, declared in settings, or remembered."""

    pools: Mapping[str, PoolEntry] = field(default_factory=dict)

    def workers_of(self, model: str) -> int:
        """How many workers take work for ``model`` now."""
        entry = self.pools.get(model)
        return entry.workers if entry else 0

    def serves_in(self, model: str, region: str) -> bool:
        """Whether a worker of ``region`` takes work for ``model`` now."""
        entry = self.pools.get(model)
        return entry is not None and region in entry.regions


def build_directory(
    fleet: Iterable[WorkerInfo], remembered: Iterable[Pool], declared: Iterable[str], before: Directory, now_s: int
) -> Directory:
    """The directory of this moment; ``before`` keeps the dates at which models were first seen."""
    workers: dict[str, int] = dict.fromkeys((*declared, *remembered), 0)
    slots = workers.copy()
    regions: dict[str, set[str]] = {}
    for info in fleet:
        for model in dict.fromkeys(info.models):
            workers.setdefault(model, 0)
            slots.setdefault(model, 0)
            if info.takes_work:
                workers[model] += 1
                slots[model] += info.slots
                regions.setdefault(model, set()).add(info.region)
    known = before.pools
    return Directory(
        {
            model: PoolEntry(
                count,
                slots[model],
                known[model].first_seen_s if model in known else now_s,
                frozenset(regions.get(model, ())),
            )
            for model, count in sorted(workers.items())
        }
    )


def model_object(model: str, entry: PoolEntry) -> dict[str, object]:
    """OpenAI's model object."""
    return {"id": model, "object": "model", "created": entry.first_seen_s, "owned_by": "inferq"}


def model_list(directory: Directory) -> dict[str, object]:
    """OpenAI's list of models."""
    return {"object": "list", "data": [model_object(model, entry) for model, entry in directory.pools.items()]}


def pool_of(model: str, directory: Directory, lanes: Mapping[Lane, LaneDepth]) -> PoolDepth:
    """The queue of one model in figures."""
    entry = directory.pools.get(model)
    return pool_depth(model, lanes, workers=entry.workers if entry else 0, slots=entry.slots if entry else 0)


def pool_list(directory: Directory, depths: Mapping[Pool, Mapping[Lane, LaneDepth]]) -> PoolList:
    """The queues of all models, those included that only have jobs left."""
    models = sorted({*directory.pools, *depths})
    return PoolList(pools=[pool_of(model, directory, depths.get(Pool(model), {})) for model in models])
