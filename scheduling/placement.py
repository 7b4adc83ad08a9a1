"""Which model each worker should load, of those that it could: from what waits, what serves, and what a load costs.

The acting Manager calls :func:`place` once a round and tells the workers. Rules:

* **A pool with waiting jobs and no worker** gets one in this round, from the first of: a worker whose pool has nothing
  to do; a worker whose pool has room without it, or has only batches and background jobs in time, where interactive
  jobs wait; and, once its work has waited as long as its model takes to load, a worker whose pool needs it, if that
  pool's oldest job has waited less long, or this pool was without a worker for ``SLICES`` dwell times. The pool that
  was so for longest goes first, so busy models take turns on one worker.
* **A pool below its declared minimum** gets a worker whose pool has nothing to do, or room without it.
* **A pool with more jobs than slots**, whose oldest has waited as long as its model takes to load, gets one worker a
  round, of a pool that has room without it, or of one with too many jobs as well but fewer to a slot, also afterwards,
  by ``MARGIN``. Never the last worker of a pool with work.
* **No worker moves twice within its dwell time**: twice what it took to load its model, so that at most about half of
  its time is spent on loading (ski rental, as :mod:`scheduling.autoscale` says). A worker that loads is left alone.
* **No pool falls below its minimum** or rises above its maximum by a move.
* Where a load failed, the worker is free for other models at once and not asked for that model again for a while.

Of background jobs and batches, only the time counts that they waited beyond ``BACKGROUND_WAIT_S``: a batch takes no
worker that interactive requests use, until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from queue_schemas import Lane, LaneDepth

MAX_MOVES = 4
"""Most moves a round, of any number of workers: what was decided is seen before more is."""
DWELLS = 2.0
SLICES = 4
MARGIN = 1.25
UTILIZATION = 0.85
"""Share of a pool's slots that interactive jobs may fill where a worker is taken for work that is not interactive."""
BACKGROUND_WAIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """What an operator declares of a pool: bounds on its workers, and how long its model takes to load."""

    min_workers: int = 0
    max_workers: int = 100_000
    start_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDemand:
    """A pool now: ``interactive`` jobs and ``others`` that wait or run, how many of all are ``waiting``, how long the
    oldest of these has waited (``age_s``), and how long beyond what its lane allows (``late_s``; below 0: in time).
    ``unserved_s``: for how long jobs have waited without a worker that serves or loads it."""

    model: str
    interactive: int = 0
    others: int = 0
    waiting: int = 0
    age_s: float = 0.0
    late_s: float = 0.0
    unserved_s: float = 0.0
    rules: PoolRules = field(default_factory=PoolRules)

    @property
    def outstanding(self) -> int:
        return self.interactive + self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWorker:
    """A worker that is there. ``models`` are those that it serves, or will when ``loaded`` is; ``loadable`` is empty
    for one that cannot load another.

    ``since_s``: how long ago it was told to load ``loaded``; None: never. ``load_s``: how long that took, None while it
    is under way. ``failed``: the load failed. ``refused``: models that failed here not long ago.
    """

    worker_id: str
    models: frozenset[str]
    slots: int
    loaded: str = ""
    loadable: frozenset[str] = frozenset()
    running: int = 0
    since_s: float | None = None
    load_s: float | None = 0.0
    failed: bool = False
    refused: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Move:
    """A worker is to load ``model``, and why."""

    worker_id: str
    model: str
    why: str


def demand_of(model: str, lanes: Mapping[Lane, LaneDepth], rules: PoolRules, unserved_s: float = 0.0) -> PoolDemand:
    """The demand of a pool whose lanes are ``lanes``; one that is not there is empty."""
    ages = {lane: depth.oldest_age_ms / 1000 for lane, depth in lanes.items() if depth.waiting}
    late = (age - (0.0 if lane is Lane.INTERACTIVE else BACKGROUND_WAIT_S) for lane, age in ages.items())
    outstanding = {lane: depth.waiting + depth.leased for lane, depth in lanes.items()}
    interactive = outstanding.pop(Lane.INTERACTIVE, 0)
    return PoolDemand(
        model=model,
        interactive=interactive,
        others=sum(outstanding.values()),
        waiting=sum(depth.waiting for depth in lanes.values()),
        age_s=max(ages.values(), default=0.0),
        late_s=max(late, default=0.0),
        unserved_s=unserved_s,
        rules=rules,
    )


def place(pools: Iterable[PoolDemand], workers: Iterable[PlacedWorker]) -> list[Move]:
    """The moves of one round, ``MAX_MOVES`` at most. A pool that is not in ``pools`` has no jobs and no rules."""
    fleet = _Fleet(pools, workers)
    moves: list[Move] = []
    for taker, why in fleet.takers():
        if len(moves) == MAX_MOVES:
            break
        if (worker := fleet.donor(taker)) is not None:
            fleet.move(worker, taker)
            moves.append(Move(worker.worker_id, taker.model, why))
    return moves


def dwell_s(worker: PlacedWorker, rules: PoolRules) -> float:
    """How long a worker stays with its model, whose pool has ``rules``, from when it was told to load it."""
    return DWELLS * max(rules.start_s, worker.load_s or 0.0)


class _Fleet:
    """The fleet as it will be once the moves so far are done."""

    def __init__(self, pools: Iterable[PoolDemand], workers: Iterable[PlacedWorker]) -> None:
        self._pools = {pool.model: pool for pool in pools}
        self._workers: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._free: dict[str, list[PlacedWorker]] = {}
        """By model, the workers that could load it and may move."""
        self._moved: set[str] = set()
        for worker in workers:
            if not worker.failed:
                self._count(worker, worker.models, 1)
            if self._may_move(worker):
                for model in worker.loadable - worker.refused - worker.models:
                    self._free.setdefault(model, []).append(worker)

    def takers(self) -> list[tuple[PoolDemand, str]]:
        """The pools that need a worker, the most urgent first, and why."""
        starved, below, overloaded = list[PoolDemand](), list[PoolDemand](), list[PoolDemand]()
        for pool in self._pools.values():
            workers = self._workers.get(pool.model, 0)
            if workers >= pool.rules.max_workers or pool.model not in self._free:
                continue
            if pool.waiting and not workers:
                starved.append(pool)
            elif workers < pool.rules.min_workers:
                below.append(pool)
            elif pool.waiting and pool.outstanding > self._slots[pool.model] and pool.age_s >= pool.rules.start_s:
                overloaded.append(pool)
        return [
            *((pool, "jobs wait and no worker serves them") for pool in sorted(starved, key=_by_lateness)),
            *((pool, "it has fewer workers than declared") for pool in sorted(below, key=_by_lateness)),
            *((pool, "more jobs than slots") for pool in sorted(overloaded, key=self._by_load)),
        ]

    def donor(self, taker: PoolDemand) -> PlacedWorker | None:
        """The worker whose loss costs least, of those that may be taken for ``taker``."""
        allowed = (
            (rank, self._load_without(worker), worker.running, worker.worker_id, worker)
            for worker in self._free[taker.model]
            if worker.worker_id not in self._moved and (rank := self._rank(worker, taker)) is not None
        )
        return min(allowed, default=(None,), key=lambda one: one[:-1])[-1]

    def move(self, worker: PlacedWorker, taker: PoolDemand) -> None:
        """``worker`` goes to ``taker``."""
        self._moved.add(worker.worker_id)
        if not worker.failed:
            self._count(worker, worker.models, -1)
        self._count(worker, (taker.model,), 1)

    def _count(self, worker: PlacedWorker, models: Iterable[str], sign: int) -> None:
        for model in models:
            self._workers[model] = self._workers.get(model, 0) + sign
            self._slots[model] = self._slots.get(model, 0) + sign * worker.slots

    def _may_move(self, worker: PlacedWorker) -> bool:
        if worker.failed or worker.since_s is None:
            return True
        return worker.load_s is not None and worker.since_s >= self._dwell_s(worker)

    def _dwell_s(self, worker: PlacedWorker) -> float:
        return dwell_s(worker, self._pool(worker.loaded).rules)

    def _pool(self, model: str) -> PoolDemand:
        return self._pools.get(model) or PoolDemand(model=model)

    def _rank(self, worker: PlacedWorker, taker: PoolDemand) -> int | None:
        """How much it costs to take ``worker`` for ``taker``, 0 the least; None: it may not be taken."""
        if worker.failed:
            return 0
        ranks = [self._rank_of(self._pool(model), worker, taker) for model in worker.models]
        known = [rank for rank in ranks if rank is not None]
        return max(known, default=0) if len(known) == len(ranks) else None

    def _rank_of(self, giver: PoolDemand, worker: PlacedWorker, taker: PoolDemand) -> int | None:
        """The same, for one of the pools that ``worker`` serves."""
        if self._workers[giver.model] <= giver.rules.min_workers:
            return None
        if not giver.outstanding:
            return 0
        left = self._slots[giver.model] - worker.slots
        if self._workers.get(taker.model, 0) >= max(taker.rules.min_workers, 1):
            return 1 if self._evens_out(giver, left, worker, taker) else None
        may_wait = not giver.interactive and giver.late_s <= 0
        if _fits(giver, left) or (may_wait and taker.waiting and taker.late_s >= 0):
            return 1
        older = taker.late_s >= giver.late_s or taker.unserved_s >= SLICES * self._dwell_s(worker)
        return 2 if taker.waiting and older and taker.late_s >= taker.rules.start_s else None

    def _evens_out(self, giver: PoolDemand, left: int, worker: PlacedWorker, taker: PoolDemand) -> bool:
        """Whether ``taker`` has still more jobs for each slot afterwards. What fits must fit afterwards, or the worker
        would soon be wanted back. Interactive jobs count alone where they do not fit; else those of ``giver`` must."""
        if left <= 0 or taker.late_s < taker.rules.start_s:
            return False
        if giver.outstanding <= self._slots[giver.model]:
            return _fits(giver, left)
        slots = self._slots[taker.model]
        if taker.interactive > slots:
            return MARGIN * giver.interactive / left <= taker.interactive / (slots + worker.slots)
        fits = giver.interactive <= UTILIZATION * left
        return fits and MARGIN * giver.outstanding / left <= taker.outstanding / (slots + worker.slots)

    def _load_without(self, worker: PlacedWorker) -> float:
        """Jobs for each slot of the fullest pool of ``worker``, without it."""
        return max(
            (
                self._pool(model).outstanding / max(self._slots[model] - worker.slots, 1)
                for model in worker.models
                if model in self._slots
            ),
            default=0.0,
        )

    def _by_load(self, pool: PoolDemand) -> tuple[float, str]:
        return (-pool.outstanding / max(self._slots[pool.model], 1), pool.model)


def _fits(pool: PoolDemand, slots: int) -> bool:
    return pool.outstanding <= slots and pool.interactive <= UTILIZATION * slots


def _by_lateness(pool: PoolDemand) -> tuple[bool, float, float, str]:
    return (pool.late_s <= 0, -pool.unserved_s, -pool.late_s, pool.model)
