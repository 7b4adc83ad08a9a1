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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from queue_schemas import Lane, LaneDepth
from queue_schemas.records import record

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


@record
class _Loss:
    """The cost of losing ``worker``, for any taker. ``order``: of two that are equally good, the lesser goes. The rest
    is about those of its pools that have jobs, and the workers that would be left to them:

    ``fits``: they have room; ``may_wait``: or their jobs are batches and background jobs in time. ``late_s``: how late
    the latest of the others is; ``enough_s``: after so long without a worker a pool takes this one from later work.
    ``evens_out``: there are some, with room where there is room now. ``interactive``, ``outstanding``: where there is
    none now, the most jobs to a slot, ``MARGIN`` included; ``outstanding`` is infinite if interactive ones do not fit.
    """

    worker: PlacedWorker
    order: tuple[float, int, str]
    is_idle: bool = True
    fits: bool = True
    may_wait: bool = True
    late_s: float = -inf
    enough_s: float = 0.0
    evens_out: bool = True
    interactive: float = 0.0
    outstanding: float = 0.0


class _Donors:
    """Workers that may be taken, by what is lost with them: the least first."""

    def __init__(self, losses: Iterable[_Loss]) -> None:
        in_order = sorted(losses, key=lambda loss: loss.order)
        self._idle = [loss for loss in in_order if loss.is_idle]
        self._busy = [loss for loss in in_order if not loss.is_idle]
        # What the best of the busy ones allows: most pools that cannot have any are told so without looking at each.
        self._fits = any(loss.fits for loss in self._busy)
        self._may_wait = any(loss.may_wait for loss in self._busy)
        self._late_s = min((loss.late_s for loss in self._busy if not loss.may_wait), default=inf)
        self._enough_s = min((loss.enough_s for loss in self._busy), default=inf)
        self._slots = min((loss.worker.slots for loss in self._busy), default=0)
        even = [loss for loss in self._busy if loss.evens_out]
        self._interactive = min((loss.interactive for loss in even), default=inf)
        self._outstanding = min((loss.outstanding for loss in even), default=inf)

    def for_lone(self, taker: PoolDemand) -> PlacedWorker | None:
        """The best of those with work, for a pool with fewer workers than declared, or none."""
        is_urgent = bool(taker.waiting) and taker.late_s >= 0
        is_late = bool(taker.waiting) and taker.late_s >= taker.rules.start_s
        second: PlacedWorker | None = None
        if (
            self._fits
            or (is_urgent and self._may_wait)
            or (is_late and (taker.late_s >= self._late_s or taker.unserved_s >= self._enough_s))
        ):
            for loss in self._that_can_load(taker.model, self._busy):
                if loss.fits or (is_urgent and loss.may_wait):
                    return loss.worker
                is_older = taker.late_s >= loss.late_s or taker.unserved_s >= loss.enough_s
                if second is None and is_late and is_older:
                    second = loss.worker
        return second

    def for_overloaded(self, taker: PoolDemand, slots: int) -> PlacedWorker | None:
        """The best of them for a pool with ``slots`` that has still more jobs for each of them afterwards. What fits
        must fit afterwards, or the worker would soon be wanted back. Interactive jobs count alone where they do not
        fit; else those of the giver must."""
        if taker.late_s < taker.rules.start_s:
            return None
        counts_interactive = taker.interactive > slots
        jobs = taker.interactive if counts_interactive else taker.outstanding
        if (self._interactive if counts_interactive else self._outstanding) > jobs / max(slots + self._slots, 1):
            return None
        for loss in self._that_can_load(taker.model, self._busy):
            load = loss.interactive if counts_interactive else loss.outstanding
            if loss.evens_out and load <= jobs / max(slots + loss.worker.slots, 1):
                return loss.worker
        return None

    def idle(self, taker: PoolDemand) -> PlacedWorker | None:
        """The best of those that have nothing to do."""
        return next((loss.worker for loss in self._that_can_load(taker.model, self._idle)), None)

    @staticmethod
    def _that_can_load(model: str, losses: list[_Loss]) -> Iterator[_Loss]:
        for loss in losses:
            worker = loss.worker
            if model in worker.loadable and model not in worker.models and model not in worker.refused:
                yield loss


class _Fleet:
    """The fleet as it will be once the moves so far are done."""

    def __init__(self, pools: Iterable[PoolDemand], workers: Iterable[PlacedWorker]) -> None:
        self._pools = {pool.model: pool for pool in pools}
        self._workers: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._free: dict[str, PlacedWorker] = {}
        """The workers that may move, by id."""
        self._losses: dict[str, _Loss | None] = {}
        self._donors: _Donors | None = None
        """What is known of them in this state of the fleet."""
        for worker in workers:
            if not worker.failed:
                self._count(worker, worker.models, 1)
            if worker.loadable and self._may_move(worker):
                self._free[worker.worker_id] = worker

    def takers(self) -> list[tuple[PoolDemand, str]]:
        """The pools that need a worker, the most urgent first, and why."""
        starved, below, overloaded = list[PoolDemand](), list[PoolDemand](), list[PoolDemand]()
        for pool in self._pools.values():
            workers = self._workers.get(pool.model, 0)
            if workers >= pool.rules.max_workers:
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
        if self._donors is None:
            losses = map(self._loss, self._free.values())
            self._donors = _Donors(loss for loss in losses if loss is not None)
        if self._workers.get(taker.model, 0) < max(taker.rules.min_workers, 1):
            return self._donors.idle(taker) or self._donors.for_lone(taker)
        return self._donors.idle(taker) or self._donors.for_overloaded(taker, self._slots[taker.model])

    def move(self, worker: PlacedWorker, taker: PoolDemand) -> None:
        """``worker`` goes to ``taker``."""
        del self._free[worker.worker_id]
        self._donors = None
        changed = {taker.model, *worker.models}
        for one in self._free.values():
            if not changed.isdisjoint(one.models):
                self._losses.pop(one.worker_id, None)
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

    def _loss(self, worker: PlacedWorker) -> _Loss | None:
        """The cost of losing ``worker``; None if its pools cannot spare it for any taker."""
        if worker.worker_id not in self._losses:
            self._losses[worker.worker_id] = self._loss_of(worker)
        return self._losses[worker.worker_id]

    def _loss_of(self, worker: PlacedWorker) -> _Loss | None:
        load, late_s, interactive, outstanding = 0.0, -inf, 0.0, 0.0
        is_idle = fits = evens_out = True
        for model in worker.models:
            giver, slots = self._pool(model), self._slots.get(model)
            if slots is None:  # a load of it failed here, and nobody serves it
                continue
            left = slots - worker.slots
            load = max(load, giver.outstanding / max(left, 1))
            if worker.failed:
                continue
            if self._workers[model] <= giver.rules.min_workers:
                return None
            if not giver.outstanding:
                continue
            is_idle, has_room = False, _fits(giver, left)
            if not has_room:
                fits = False
                if giver.interactive or giver.late_s > 0:
                    late_s = max(late_s, giver.late_s)
            if giver.outstanding <= slots:
                evens_out = evens_out and left > 0 and has_room
            elif left > 0:
                interactive = max(interactive, MARGIN * giver.interactive / left)
                fits_after = giver.interactive <= UTILIZATION * left
                outstanding = max(outstanding, MARGIN * giver.outstanding / left if fits_after else inf)
            else:
                evens_out = False
        order = (load, worker.running, worker.worker_id)
        if is_idle:
            return _Loss(worker, order)
        enough_s = SLICES * self._dwell_s(worker)
        may_wait = late_s == -inf
        return _Loss(worker, order, False, fits, may_wait, late_s, enough_s, evens_out, interactive, outstanding)

    def _by_load(self, pool: PoolDemand) -> tuple[float, str]:
        return (-pool.outstanding / max(self._slots[pool.model], 1), pool.model)


def _fits(pool: PoolDemand, slots: int) -> bool:
    return pool.outstanding <= slots and pool.interactive <= UTILIZATION * slots


def _by_lateness(pool: PoolDemand) -> tuple[bool, float, float, str]:
    return (pool.late_s <= 0, -pool.unserved_s, -pool.late_s, pool.model)
