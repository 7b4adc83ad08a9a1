"""Which LoRA adapters each worker should hold, of those that it may load: from what waits, and what is needed least.

The acting Manager calls :func:`assign_adapters` once a round and tells the workers. Rules:

* **An adapter with waiting jobs and no worker** gets a place in this round, the first of: free room; the place of an
  adapter without jobs, the least recently needed one first; that of one whose other workers have room for all its jobs;
  and that of one with jobs which had its turn, ``TURN_S``. The adapter that was without a worker for longest goes
  first, so more adapters than room take turns. Among places that are equally good, the worker that loads and runs
  least.
* **An adapter whose jobs wait beside workers that hold it**, for ``SPREAD_WAIT_S``, gets one more worker a round, once
  the last one has loaded it: one with a free slot, and room or an adapter without jobs.
* **An adapter stays for a while**: ``STAY_S``, or twice what its load took. One that loads is left alone. So a place
  changes hands at most once in that time, also where demand jumps between adapters.
* Background jobs and batches in time (:mod:`scheduling.placement`) end no turn of interactive jobs.
* A worker that could not load an adapter is not asked again for a while; one that takes long is not waited for.
* At most ``MAX_CHANGES`` a round, and ``MAX_LOADING`` loads of a worker at a time. What was decided counts at once.

A round takes time for workers, for what they hold and for adapters with jobs: not for their product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from queue_schemas.records import record

from .placement import PoolDemand

MAX_CHANGES = 64
MAX_LOADING = 4
"""A worker loads one after another: what is told it at once, it begins within moments."""
LOADS = 2.0
STAY_S, MAX_STAY_S = 5.0, 30.0
TURN_S, MAX_TURN_S = 15.0, 60.0
"""A load that waits for jobs of the last adapter may take long: the longest stay and turn bound what others wait."""
SPREAD_WAIT_S = 2.0
LATE_S = 10.0
"""After so long, a load that is not done does not count as a worker: it may wait for jobs of the adapter before."""
SPARE = 0.5
"""Part of the slots of an adapter's other workers that its jobs may fill where one of its workers is taken."""


@record
class HeldAdapter:
    """An adapter that a worker was told to load ``since_s`` ago, and how long that took; None: it is under way."""

    since_s: float
    load_s: float | None

    @property
    def held_s(self) -> float:
        """For how long it is loaded."""
        return 0.0 if self.load_s is None else self.since_s - self.load_s

    @property
    def has_stayed(self) -> bool:
        return self.load_s is not None and self.held_s >= min(max(STAY_S, LOADS * self.load_s), MAX_STAY_S)

    @property
    def had_its_turn(self) -> bool:
        return self.load_s is not None and self.held_s >= min(max(TURN_S, LOADS * self.load_s), MAX_TURN_S)


@record(kw_only=True)
class AdapterWorker:
    """A worker whose engine serves the base model of its ``loadable`` adapters, ``room`` of them at a time. ``held``:
    those that it was told to load; ``refused``: those that failed here not long ago."""

    worker_id: str
    loadable: frozenset[str]
    room: int
    slots: int
    running: int = 0
    held: Mapping[str, HeldAdapter] = field(default_factory=dict)
    refused: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """A worker is to load ``adapter``, and unload ``instead_of`` for it (empty: it has room); and why."""

    worker_id: str
    adapter: str
    instead_of: str
    why: str


def assign_adapters(
    pools: Iterable[PoolDemand],
    workers: Iterable[AdapterWorker],
    idle_s: Mapping[str, float],
    unknown: Collection[str] = (),
) -> list[AdapterChange]:
    """The changes of one round. ``pools``: adapters with jobs; ``idle_s``: for how long others had none (not in it:
    longer than anybody remembers); ``unknown``: adapters whose queue does not answer, which stay where they are."""
    fleet = _Fleet(pools, workers, idle_s, unknown)
    changes: list[AdapterChange] = []
    for taker, tiers, why in fleet.takers():
        if len(changes) == MAX_CHANGES:
            break
        if (place := fleet.place_for(taker.model, tiers)) is not None:
            changes.append(AdapterChange(place.worker.worker_id, taker.model, place.victim, why))
    return changes


class _Tier(IntEnum):
    """Kinds of places, the best first."""

    FREE = 0
    IDLE = 1
    SPARE = 2
    TURN_OF_OTHERS = 3
    TURN_OF_INTERACTIVE = 4
    OPEN_FREE = 5
    """Those of FREE on workers with a free slot."""
    OPEN_IDLE = 6


_ANY_TURN = (_Tier.FREE, _Tier.IDLE, _Tier.SPARE, _Tier.TURN_OF_OTHERS, _Tier.TURN_OF_INTERACTIVE)
_TURN_OF_OTHERS = _ANY_TURN[:-1]
_NO_TURN = _ANY_TURN[:3]
_SPREAD = (_Tier.OPEN_FREE, _Tier.OPEN_IDLE)
_Key = tuple[float, float, float, str, str]


class _Candidate:
    """A worker in this round."""

    __slots__ = ("loading", "new", "worker")

    def __init__(self, worker: AdapterWorker) -> None:
        self.worker = worker
        self.loading = sum(1 for held in worker.held.values() if held.load_s is None)
        self.new: set[str] = set()
        """What it is to load by this round."""

    def may_load(self, model: str) -> bool:
        worker = self.worker
        return model not in worker.held and model not in self.new and model not in worker.refused


@dataclass(slots=True)
class _Place:
    """Room for one adapter, free or that of ``victim``. Of two, the one with the lesser ``key`` is taken."""

    key: _Key
    candidate: _Candidate
    victim: str = ""
    is_taken: bool = False

    @property
    def worker(self) -> AdapterWorker:
        return self.candidate.worker


class _Places:
    """Places of one tier, the best first."""

    __slots__ = ("_begin", "_places")

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._begin = 0

    def add(self, place: _Place) -> None:
        self._places.append(place)

    def sort(self) -> None:
        self._places.sort(key=lambda place: place.key)

    def first(self, model: str, given_up: Collection[str]) -> _Place | None:
        """The best one that may load ``model``. Of an adapter that was ``given_up`` in this round, none."""
        while self._begin < len(self._places) and not _is_left(self._places[self._begin], given_up):
            self._begin += 1
        for at in range(self._begin, len(self._places)):
            place = self._places[at]
            if _is_left(place, given_up) and place.candidate.may_load(model):
                return place
        return None


def _is_left(place: _Place, given_up: Collection[str]) -> bool:
    return not place.is_taken and place.candidate.loading < MAX_LOADING and place.victim not in given_up


class _Fleet:
    """The fleet as it will be once the changes so far are done."""

    def __init__(
        self,
        pools: Iterable[PoolDemand],
        workers: Iterable[AdapterWorker],
        idle_s: Mapping[str, float],
        unknown: Collection[str],
    ) -> None:
        self._pools = {pool.model: pool for pool in pools if pool.outstanding and pool.model not in unknown}
        self._idle_s = idle_s
        self._unknown = unknown
        self._told: dict[str, int] = {}
        self._serving: dict[str, int] = {}
        """Workers that hold an adapter, or load it and are not late with it."""
        self._loaded: dict[str, int] = {}
        """Workers that hold it."""
        self._loaded_slots: dict[str, int] = {}
        """Slots of these."""
        self._given_up: set[str] = set()
        """Adapters with jobs of which a place was taken: no second one in the same round."""
        candidates = [_Candidate(worker) for worker in workers]
        for candidate in candidates:
            self._count(candidate.worker)
        # Most workers may load the same adapters.
        self._groups: dict[frozenset[str], dict[_Tier, _Places]] = {}
        for candidate in candidates:
            self._add_places(candidate)
        for tiers in self._groups.values():
            for places in tiers.values():
                places.sort()

    def takers(self) -> list[tuple[PoolDemand, tuple[_Tier, ...], str]]:
        """The adapters that need a place, the most urgent first, which places they may have, and why."""
        starved, late, overloaded = list[PoolDemand](), list[PoolDemand](), list[PoolDemand]()
        for pool in self._pools.values():
            if not pool.waiting:
                continue
            if serving := self._serving.get(pool.model, 0):
                if serving == self._loaded.get(pool.model, 0) and pool.age_s >= SPREAD_WAIT_S:
                    overloaded.append(pool)
            elif self._told.get(pool.model, 0):
                late.append(pool)
            else:
                starved.append(pool)
        return [
            *(
                (pool, _ANY_TURN if pool.late_s >= 0 else _TURN_OF_OTHERS, "jobs wait and no worker holds it")
                for pool in sorted(starved, key=_by_lateness)
            ),
            *((pool, _NO_TURN, "its worker is late with it") for pool in sorted(late, key=_by_lateness)),
            *((pool, _SPREAD, "its jobs wait for a slot") for pool in sorted(overloaded, key=self._by_load)),
        ]

    def place_for(self, model: str, tiers: tuple[_Tier, ...]) -> _Place | None:
        """Take the best place for ``model``."""
        groups = [places for loadable, places in self._groups.items() if model in loadable]
        for tier in tiers:
            found = (places[tier].first(model, self._given_up) for places in groups if tier in places)
            best = min((place for place in found if place is not None), key=lambda place: place.key, default=None)
            if best is not None:
                best.is_taken = True
                best.candidate.loading += 1
                best.candidate.new.add(model)
                if best.victim in self._pools:
                    self._given_up.add(best.victim)
                return best
        return None

    def _count(self, worker: AdapterWorker) -> None:
        for model, held in worker.held.items():
            self._told[model] = self._told.get(model, 0) + 1
            if held.load_s is not None:
                self._loaded[model] = self._loaded.get(model, 0) + 1
                self._loaded_slots[model] = self._loaded_slots.get(model, 0) + worker.slots
            if held.load_s is not None or held.since_s < LATE_S:
                self._serving[model] = self._serving.get(model, 0) + 1

    def _add_places(self, candidate: _Candidate) -> None:
        worker = candidate.worker
        if not worker.loadable or candidate.loading >= MAX_LOADING:
            return
        free = worker.room - len(worker.held)
        busy = worker.running / max(worker.slots, 1)
        for number in range(candidate.loading, min(candidate.loading + max(free, 0), MAX_LOADING)):
            key = (float(number), busy, float(len(worker.held)), worker.worker_id, "")
            self._add(_Tier.FREE, _Place(key, candidate))
        if free > 0:
            return
        for model, held in worker.held.items():
            if held.has_stayed and model not in self._unknown:
                self._add_victim(candidate, model, held, busy)

    def _add_victim(self, candidate: _Candidate, model: str, held: HeldAdapter, busy: float) -> None:
        """The place of ``model``, if an adapter that needs one may have it."""
        worker = candidate.worker
        pool = self._pools.get(model)
        if pool is None:
            key = (-self._idle_s.get(model, inf), float(candidate.loading), busy, worker.worker_id, model)
            self._add(_Tier.IDLE, _Place(key, candidate, model))
            return
        others = self._loaded_slots[model] - worker.slots
        key = (float(pool.waiting > 0), -held.held_s, busy, worker.worker_id, model)
        if others > 0 and not pool.waiting and pool.outstanding <= SPARE * others:
            self._add(_Tier.SPARE, _Place(key, candidate, model))
        elif held.had_its_turn:
            tier = _Tier.TURN_OF_INTERACTIVE if pool.interactive else _Tier.TURN_OF_OTHERS
            self._add(tier, _Place(key, candidate, model))

    def _add(self, tier: _Tier, place: _Place) -> None:
        tiers = self._groups.setdefault(place.worker.loadable, {})
        tiers.setdefault(tier, _Places()).add(place)
        has_slot = place.worker.running < place.worker.slots
        if has_slot and tier in (_Tier.FREE, _Tier.IDLE):
            open_tier = _Tier.OPEN_FREE if tier is _Tier.FREE else _Tier.OPEN_IDLE
            tiers.setdefault(open_tier, _Places()).add(place)

    def _by_load(self, pool: PoolDemand) -> tuple[float, str]:
        return (-pool.outstanding / max(self._loaded_slots[pool.model], 1), pool.model)


def _by_lateness(pool: PoolDemand) -> tuple[bool, float, float, str]:
    return (pool.late_s < 0, -pool.unserved_s, -pool.late_s, pool.model)
