"""How many workers a pool needs: from its queue at one moment, and over time without flapping.

Routers say the first for KEDA and HPA, the autoscaler follows the second, the simulator runs both.

* :func:`replicas_wanted` needs no memory, so any number of Routers say the same.
* :class:`Stabilizer` remembers what was wanted: more workers come at once, fewer only after nothing more was wanted for
  a whole window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from queue_schemas import Lane, LaneDepth, PoolDepth

MAX_REPLICAS = 100_000
MAX_SLOWDOWN = 4
"""A job takes at most so many times as long on a full worker as it does now. Where workers were seen to serve less, the
reason was another one: an engine hung."""
_MAX_COUNT = 2**40
"""No queue, age or duration is larger; what claims to be is no measurement."""


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """One lane of a pool now. ``run_ms`` is how long those waiting will keep their slots, on average, ``usual_run_ms``
    how long jobs kept theirs of late, ``ms_per_cost`` how long for each unit of what they were thought to cost,
    ``deadline_ms`` the time that is left until the earliest deadline of those waiting; None: unknown."""

    waiting: int = 0
    leased: int = 0
    oldest_age_ms: float = 0
    run_ms: float | None = None
    deadline_ms: float | None = None
    usual_run_ms: float | None = None
    ms_per_cost: float | None = None


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool now. ``workers`` take work for it with ``slots`` together. ``arrivals_per_s`` counts interactive jobs;
    None: unknown."""

    lanes: Mapping[Lane, LaneLoad]
    workers: int = 0
    slots: int = 0
    arrivals_per_s: float | None = None


def load_of(pool: PoolDepth) -> PoolLoad:
    """What a Router or Manager says of a pool, as a load. How long a job of a lane keeps its slot follows from what
    those waiting there are thought to cost, and from how long jobs of that cost took of late."""
    lanes = {
        lane: LaneLoad(
            waiting=depth.waiting,
            leased=depth.leased,
            oldest_age_ms=depth.oldest_age_ms,
            run_ms=_run_ms(depth),
            deadline_ms=depth.deadline_ms,
            usual_run_ms=depth.ms_per_job,
            ms_per_cost=depth.ms_per_cost,
        )
        for lane, depth in pool.lanes.items()
    }
    interactive = pool.lanes.get(Lane.INTERACTIVE)
    arrivals_per_s = interactive.arrivals_per_s if interactive else None
    return PoolLoad(lanes, workers=pool.workers, slots=pool.slots, arrivals_per_s=arrivals_per_s)


def together(loads: Sequence[PoolLoad]) -> PoolLoad:
    """Pools that the same workers serve, those of the first, as one: a model and its LoRA adapters."""
    first, *others = loads
    if not others:
        return first
    lanes = {lane: _lanes_together([load.lanes[lane] for load in loads if lane in load.lanes]) for lane in Lane}
    arrivals = [load.arrivals_per_s for load in loads if load.arrivals_per_s is not None]
    return PoolLoad(
        {lane: of_lane for lane, of_lane in lanes.items() if of_lane != LaneLoad()},
        workers=first.workers,
        slots=first.slots,
        arrivals_per_s=sum(arrivals) if arrivals else None,
    )


def _lanes_together(lanes: Sequence[LaneLoad]) -> LaneLoad:
    return LaneLoad(
        waiting=sum(lane.waiting for lane in lanes),
        leased=sum(lane.leased for lane in lanes),
        oldest_age_ms=max((lane.oldest_age_ms for lane in lanes), default=0),
        run_ms=_mean((lane.run_ms, lane.waiting) for lane in lanes),
        deadline_ms=min((lane.deadline_ms for lane in lanes if lane.deadline_ms is not None), default=None),
        usual_run_ms=_mean((lane.usual_run_ms, lane.waiting + lane.leased) for lane in lanes),
        ms_per_cost=_mean((lane.ms_per_cost, lane.waiting + lane.leased) for lane in lanes),
    )


def _mean(figures: Iterable[tuple[float | None, int]]) -> float | None:
    """Of those that are known, by how many jobs each is of; of none, evenly."""
    known = [(figure, jobs) for figure, jobs in figures if figure is not None]
    if not known:
        return None
    jobs = sum(number for _, number in known)
    return sum(figure * (number if jobs else 1) for figure, number in known) / (jobs or len(known))


def _run_ms(depth: LaneDepth) -> float | None:
    """The average of those waiting; None while it is unknown."""
    if depth.waiting < 1 or depth.cost < 1 or not depth.ms_per_cost:
        return None
    return depth.cost * depth.ms_per_cost / depth.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """What an operator asks for.

    An interactive job should wait at most ``target_wait_ms``, background jobs and batches ``background_wait_ms``, all
    the less if their deadline says so. ``worker_slots`` is what a worker has while none is there to tell. Interactive
    jobs take at most ``utilization`` of what workers were seen to serve; where arrivals are unknown, of the slots, the
    first job aside. Fewer workers are wanted once no more were for ``scale_in_after_ms``, and for as long as a worker
    takes to start.
    """

    min: int = 0
    max: int = 1
    target_wait_ms: float = 2_000
    background_wait_ms: float = 600_000
    worker_slots: int = 32
    utilization: float = 0.85
    scale_in_after_ms: float = 60_000

    def bounded(self, replicas: int) -> int:
        """``replicas`` within the bounds."""
        return max(self.min, min(self.max, replicas))


@dataclass(frozen=True, slots=True)
class Wish:
    """How many workers are wanted, and why. None: the figures cannot be believed, so nothing is known."""

    replicas: int | None
    why: str


def replicas_wanted(
    load: PoolLoad, rules: ScalingRules, *, start_up_ms: float = 0, worker_per_s: float | None = None
) -> Wish:
    """How many workers ``load`` calls for within the bounds of ``rules``.

    Two figures only someone knows who has watched the pool: ``start_up_ms`` is how long a new worker takes until it
    takes work, ``worker_per_s`` how many interactive jobs a second one was seen to serve at most
    (:class:`scheduling.capacity.WorkerCapacity`); 0 and None: unknown.

    Of ``n`` slots, each is free again after ``run_ms`` on average, so within the wait ``T`` that is allowed they
    begin ``n * T / run_ms`` jobs beside those that run: all who wait now have begun by then if ``n >= (waiting +
    leased) / (1 + T / run_ms)``. What the slots that are there finish, beyond what comes, before a new worker could
    take work, needs none. By Little's law, arrivals keep ``arrivals * run_ms`` slots busy: so many are wanted, and as
    many as are busy now. And as run times are shorter where slots are idle, so many workers that each serves less than
    it was seen to. A run time that is unknown counts as long: each job wants a slot of its own. Background jobs then
    want one slot until the oldest has waited too long. Where the oldest interactive job has waited too long although
    all this is met, and no slot is free, one worker more is wanted: some figure is wrong.
    """
    if fault := _fault(load, start_up_ms, worker_per_s):
        return Wish(None, fault)
    per_worker = load.slots / load.workers if load.workers and load.slots else float(rules.worker_slots)
    slots = sum(_slots_wanted(lane, of_lane, load, rules, start_up_ms) for lane, of_lane in load.lanes.items())
    wanted = _whole(slots / per_worker)
    leased = sum(lane.leased for lane in load.lanes.values())
    interactive = load.lanes.get(Lane.INTERACTIVE, LaneLoad())
    late = interactive.waiting > 0 and interactive.oldest_age_ms > rules.target_wait_ms
    if late and load.workers and leased >= load.slots:
        wanted = max(wanted, load.workers + 1)
    waiting = sum(lane.waiting for lane in load.lanes.values())
    why = f"{waiting} wait, {leased} run: {_whole(slots)} slots of {per_worker:g} a worker" + (", late" if late else "")
    if load.arrivals_per_s and worker_per_s:
        serve = _whole(min(load.arrivals_per_s / worker_per_s / rules.utilization, MAX_SLOWDOWN * slots / per_worker))
        if serve > wanted:
            wanted, why = serve, f"{why}; {load.arrivals_per_s:g}/s come, a worker serves {worker_per_s:.3g}/s"
    return Wish(rules.bounded(wanted), why)


def _slots_wanted(lane: Lane, load: LaneLoad, pool: PoolLoad, rules: ScalingRules, start_up_ms: float) -> float:
    outstanding = load.waiting + load.leased
    arrivals_per_s = pool.arrivals_per_s if lane is Lane.INTERACTIVE else None
    if not outstanding and not arrivals_per_s:
        return 0.0
    interactive = lane is Lane.INTERACTIVE
    wait_ms = rules.target_wait_ms if interactive else rules.background_wait_ms
    run_ms = load.run_ms or load.usual_run_ms
    if load.deadline_ms is not None and load.waiting:
        slack_ms = load.deadline_ms - (run_ms or 0.0)
        if slack_ms >= start_up_ms:  # or no worker can come in time
            wait_ms = min(wait_ms, slack_ms)
    if not run_ms:
        return float(outstanding if interactive or load.oldest_age_ms > wait_ms else min(outstanding, 1))
    left = float(outstanding)
    busy = float(load.leased)
    if arrivals_per_s is not None:
        comes = arrivals_per_s * (load.usual_run_ms or run_ms) / 1000
        left -= min(left, max(0.0, pool.slots - comes) * start_up_ms / run_ms)
        busy = max(busy, comes)
    elif interactive:
        busy = min(busy, 1.0) + max(0.0, busy - 1.0) / rules.utilization
    begun_in_time = left / (1 + wait_ms / run_ms)
    if not interactive:
        return begun_in_time  # runs on what the others leave, and may be handed on
    return max(begun_in_time, busy, min(outstanding, 1))


def _fault(load: PoolLoad, start_up_ms: float, worker_per_s: float | None) -> str:
    """What of ``load`` cannot be; empty if it may be so."""
    figures: dict[str, float | None] = {
        "workers": load.workers,
        "slots": load.slots,
        "arrivals": load.arrivals_per_s,
        "start-up": start_up_ms,
        "served by a worker": worker_per_s,
    }
    for lane, of_lane in load.lanes.items():
        figures |= {
            f"waiting {lane}": of_lane.waiting,
            f"leased {lane}": of_lane.leased,
            f"age {lane}": of_lane.oldest_age_ms,
            f"run time {lane}": of_lane.run_ms,
            f"usual run time {lane}": of_lane.usual_run_ms,
            f"time per cost {lane}": of_lane.ms_per_cost,
            f"deadline {lane}": of_lane.deadline_ms and max(0.0, of_lane.deadline_ms),
        }
    for name, value in figures.items():
        if value is not None and not (0 <= value <= _MAX_COUNT):  # NaN is neither
            return f"{name}: {value} cannot be"
    return ""


def _whole(figure: float) -> int:
    """The next whole number, up to ``MAX_REPLICAS``; a hair above one counts as that one."""
    return math.ceil(min(figure, MAX_REPLICAS) - 1e-9)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers there should be now, and why."""

    replicas: int
    why: str


@dataclass(slots=True)
class Stabilizer:
    """Turns wishes into sizes: up at once, down after a window.

    As the stabilization window of Kubernetes' HPA, it goes down to the most that was wanted in the window. The window
    is at least as long as a worker takes to start: to keep one for the price of starting it costs at most twice what a
    clairvoyant would pay (ski rental; A. Gandhi et al., AutoScale, ACM TOCS 30(4), 2012, keep idle servers so).
    Load that changes within the window changes the size once, and what is unknown changes nothing.
    """

    _maxima: deque[tuple[float, int]] = field(default_factory=deque)
    """When each wish was had, of those that no later one exceeds: a falling sequence."""
    _known_since_ms: float | None = None

    def decide(self, wish: Wish, size: int, now_ms: float, rules: ScalingRules, *, start_up_ms: float = 0) -> Decision:
        """The size to go to from ``size``, the workers that serve or start. ``now_ms`` is any clock that never goes
        back."""
        if wish.replicas is None:
            self._maxima.clear()
            self._known_since_ms = None
            return Decision(max(size, rules.min), f"nothing changes: {wish.why}")
        wanted = rules.bounded(wish.replicas)
        window_ms = max(rules.scale_in_after_ms, start_up_ms)
        if self._known_since_ms is None:
            self._known_since_ms = now_ms
        while self._maxima and self._maxima[-1][1] <= wanted:
            self._maxima.pop()
        self._maxima.append((now_ms, wanted))
        while self._maxima[0][0] <= now_ms - window_ms and len(self._maxima) > 1:
            self._maxima.popleft()
        if wanted >= size:
            return Decision(wanted, wish.why)
        if size > rules.max:
            return Decision(rules.max, f"at most {rules.max} may run")
        most = self._maxima[0][1]
        if now_ms - self._known_since_ms < window_ms or most >= size:
            return Decision(size, f"{wish.why}; more were wanted within {window_ms / 1000:g} s")
        return Decision(most, wish.why)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that might go."""

    worker_id: str
    running: int
    ready: bool = True


def drain_order(candidates: Iterable[Candidate]) -> list[str]:
    """Ids, those first whose end costs least: workers that take no work yet, then those that run least. Of equals the
    last by id, which is the youngest where ids are counted up."""
    ordered = sorted(candidates, key=lambda worker: (len(worker.worker_id), worker.worker_id), reverse=True)
    return [worker.worker_id for worker in sorted(ordered, key=lambda worker: (worker.ready, worker.running))]
