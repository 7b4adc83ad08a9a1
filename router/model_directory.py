"""The model directory: which models exist and how many workers serve each. Built from the registry in Redis. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from queue_schemas import Lane, LaneDepth, ModelNotFound, NoWorker, Pool, PoolDepth, PoolList, WorkerInfo
from queue_schemas.fleet.model_cards import Card, merged_card
from queue_schemas.fleet.pools import pool_depth
from scheduling.autoscale import ScalingRules, load_of, replicas_wanted

OnNoWorker = Literal["queue", "refuse"]
NO_WORKER_RETRY_S = 5
_MAX_NAMES_IN_ERROR = 10


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """One model: ``workers`` that take work for it now, their ``slots`` and ``regions``, and when it was
    ``first_seen_s`` (Unix)."""

    workers: int
    slots: int
    first_seen_s: int
    regions: frozenset[str] = frozenset()
    card: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The engine's ``/v1/models`` entry for it."""
    scaled: bool = False
    """Whether an autoscaler starts workers for it."""
    loadable: bool = False
    """Whether a worker of the fleet could load it."""

    def takes_requests(self, on_no_worker: OnNoWorker) -> bool:
        """Whether a request for it is queued: served or not, unless it would wait for a worker that nobody starts."""
        return self.workers > 0 or self.scaled or self.loadable or on_no_worker == "queue"


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
    fleet: Iterable[WorkerInfo],
    remembered: Iterable[Pool],
    declared: Iterable[str],
    before: Directory,
    now_s: int,
    *,
    scaled: Collection[Pool] = (),
    adapter_sets: Mapping[str, Iterable[str]] | None = None,
) -> Directory:
    """The current directory; ``before`` supplies when models were first seen. Workers of ``scaled`` are started by an
    autoscaler. ``adapter_sets``: the adapters that workers could load, by the names of their sets."""
    workers: dict[str, int] = dict.fromkeys((*declared, *remembered), 0)
    slots = workers.copy()
    regions: dict[str, set[str]] = {}
    cards: dict[str, list[tuple[bool, str, Card]]] = {}
    loadable: set[str] = set()
    named_sets: set[str] = set()
    for info in fleet:
        if info.is_present:
            loadable.update(info.loadable)
            named_sets.add(info.adapter_set)
        for model in dict.fromkeys(info.models):
            workers.setdefault(model, 0)
            slots.setdefault(model, 0)
            if model in info.cards:
                cards.setdefault(model, []).append((not info.takes_work, info.worker_id, info.cards[model]))
            if info.takes_work:
                workers[model] += 1
                slots[model] += info.slots
                regions.setdefault(model, set()).add(info.region)
    for name in named_sets:
        loadable.update((adapter_sets or {}).get(name, ()))
    for model in loadable:
        workers.setdefault(model, 0)
        slots.setdefault(model, 0)
    known = before.pools
    return Directory(
        {
            model: PoolEntry(
                count,
                slots[model],
                known[model].first_seen_s if model in known else now_s,
                frozenset(regions.get(model, ())),
                _card(cards.get(model, ()), known.get(model)),
                model in scaled,
                model in loadable,
            )
            for model, count in sorted(workers.items())
        }
    )


def _card(reported: Iterable[tuple[bool, str, Card]], before: PoolEntry | None) -> Mapping[str, Any]:
    """A model's card as reported by workers that serve it now, or else by others, or else the last one known."""
    ordered = sorted(reported, key=lambda one: one[:2])
    if not ordered:
        return before.card if before is not None else {}
    return merged_card(card for takes_no_work, _, card in ordered if takes_no_work == ordered[0][0])


def model_object(model: str, entry: PoolEntry, on_no_worker: OnNoWorker = "queue") -> dict[str, object]:
    """OpenAI's model object, with what the engine says of the model, and a hint if no worker serves it now."""
    shown = {"owned_by": "inferq", **entry.card}
    shown |= {"id": model, "object": "model", "created": entry.first_seen_s}
    if not entry.workers:
        becomes = "wait in the queue until one does" if entry.takes_requests(on_no_worker) else "are refused"
        shown["hint"] = f"no worker serves this model now: requests for it {becomes}"
    return shown


def model_list(directory: Directory, on_no_worker: OnNoWorker = "queue") -> dict[str, object]:
    """OpenAI's list of models: first those that a worker serves now, as clients take the first one."""
    pools = sorted(directory.pools.items(), key=lambda pool: (not pool[1].workers, pool[0]))
    return {"object": "list", "data": [model_object(model, entry, on_no_worker) for model, entry in pools]}


def pool_of(model: str, directory: Directory, lanes: Mapping[Lane, LaneDepth], rules: ScalingRules) -> PoolDepth:
    """Depth, workers and slots of one model's queue, and the workers that it calls for by ``rules``."""
    entry = directory.pools.get(model)
    pool = pool_depth(model, lanes, workers=entry.workers if entry else 0, slots=entry.slots if entry else 0)
    return pool.model_copy(update={"replicas_wanted": replicas_wanted(load_of(pool), rules).replicas})


def pool_list(directory: Directory, depths: Mapping[Pool, Mapping[Lane, LaneDepth]], rules: ScalingRules) -> PoolList:
    """The queues of all models, including models that only have jobs left."""
    models = sorted({*directory.pools, *depths})
    return PoolList(pools=[pool_of(model, directory, depths.get(Pool(model), {}), rules) for model in models])


def check_model(model: str, directory: Directory, on_no_worker: OnNoWorker) -> None:
    """Refuse a model nobody knows with ``ModelNotFound``, and with ``NoWorker`` one that no worker serves now, where
    ``on_no_worker`` says so."""
    if model not in directory.pools:
        known = sorted(directory.pools)
        names = ", ".join(known[:_MAX_NAMES_IN_ERROR]) + (", ..." if len(known) > _MAX_NAMES_IN_ERROR else "")
        there_are = f"known are: {names}" if known else "no worker has registered a model yet"
        raise ModelNotFound(f"the model {model!r} does not exist here; {there_are}", param="model")
    if not directory.pools[model].takes_requests(on_no_worker):
        raise NoWorker(
            f"no worker serves {model} now; try again later, or start one",
            param="model",
            retry_after_s=NO_WORKER_RETRY_S,
        )
