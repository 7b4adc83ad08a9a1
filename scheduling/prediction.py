"""How long a job will wait, and whether a request is worth taking in.

What is thought to go before it, in units of cost (:mod:`scheduling.cost`), takes as long as the pool's jobs took of
late for each unit of what *they* were thought to cost: estimates that are wrong by a factor do no harm. The slots that
are taken now work on that together; the first of them becomes free after half a job, on average.

* What waits in the lanes above goes first. The lanes below have a turn each in every ``LANE_CYCLE`` while they wait.
* Within the lane, retried jobs and the bands before its own go first; but new jobs have a turn in every ``BAND_STEP``,
  and its own band, as those behind it, in every ``BAND_CYCLE``.
* Tenants take turns (:mod:`scheduling.fairness`): of its own band go those of its own tenant before it, and as much of
  each other's, but no more than waits there.
* Until ``KNOWN_JOBS`` have ended, and while nothing runs (no worker, or none has taken anything), nothing is predicted.

``broker/lua/lib/{rates,prediction}.lua`` do the same in the scripts; the contract suite compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping

from queue_schemas.lanes import BAND_CYCLE, BAND_STEP, BANDS, LANE_CYCLE, LANES, Lane
from queue_schemas.records import record

RATE_JOBS = 64
"""How many of the latest jobs a rate remembers, roughly: older ones fade by one part in so many with each new one."""
FADE_MS = 10_000
"""They fade by as much for each time so long between jobs: what was an hour ago counts little beside what is now."""
KNOWN_JOBS = 8
"""How many jobs must have ended before anything is predicted. Age leaves as many: an old pace is a better guess than
none, until new jobs end."""

RETRIED = -1
"""The band of jobs that wait again, which go before all others but for every ``BAND_STEP``-th turn."""
MAX_WAIT_MS = 10_000_000_000
"""A longer wait is told as this one (about 16 weeks): no deadline is as far away."""


@record
class Rate:
    """What jobs of one pool and lane took of late: ``jobs`` (at most ``RATE_JOBS``), for how long these had a slot, in
    ms, and what they were thought to cost. It has faded for the time up to ``at_ms``, of the queue's clock."""

    jobs: int = 0
    run_ms: int = 0
    cost: int = 0
    at_ms: int = 0

    def observed(self, run_ms: int, cost: int, came_ms: int) -> Rate:
        """The rate once one more job is done, which came at ``came_ms``."""
        faded = self._at(came_ms)
        if faded.jobs < RATE_JOBS:
            return Rate(faded.jobs + 1, faded.run_ms + run_ms, faded.cost + cost, faded.at_ms)
        return Rate(
            faded.jobs,
            faded.run_ms + run_ms - faded.run_ms // RATE_JOBS,
            faded.cost + cost - faded.cost // RATE_JOBS,
            faded.at_ms,
        )

    @property
    def ms_per_cost(self) -> float | None:
        """For how long a job had its slot for each unit of cost; None while none has ended."""
        return round(self.run_ms / self.cost, 3) if self.cost else None

    @property
    def ms_per_job(self) -> float | None:
        """For how long a job had its slot; None while none has ended."""
        return round(self.run_ms / self.jobs, 3) if self.jobs else None

    def _at(self, now_ms: int) -> Rate:
        """Faded by age. Its means stay: what is old counts less beside what is new."""
        steps = max((now_ms - self.at_ms) // FADE_MS, 0)
        jobs = max(int(self.jobs * (1 - 1 / RATE_JOBS) ** steps + 0.5), min(self.jobs, KNOWN_JOBS))
        ran = max(self.jobs, 1)
        return Rate(jobs, self.run_ms * jobs // ran, self.cost * jobs // ran, self.at_ms + steps * FADE_MS)


@record
class LaneState:
    """One lane of a pool: jobs that wait, and what they cost, retried ones first, then those of each band; jobs that
    run; how fast they were."""

    waiting: int = 0
    costs: tuple[int, ...] = (0,) * (1 + BANDS)
    leased: int = 0
    rate: Rate = Rate()


@record
class Place:
    """Where a job stands. ``wait_ms``: until it starts; None: unknown, as for ``jobs_ahead``."""

    jobs_ahead: int | None
    wait_ms: int | None


def place_of(lanes: Mapping[Lane, LaneState], lane: Lane, band: int, own: int, tenants: int) -> Place:
    """The place of a job in ``lane`` of a pool: ``own`` jobs of its tenant wait before it in its ``band``, in which so
    many ``tenants`` wait. For a retried job ``band`` is ``RETRIED`` and ``tenants`` 1."""
    states = [lanes.get(one, LaneState()) for one in LANES]
    at = LANES.index(lane)
    above, below = states[:at], sum(state.waiting > 0 for state in states[at + 1 :])
    jobs, ahead = _before(states[at], band, own, tenants)
    jobs += sum(state.waiting for state in above)
    ahead += sum(_believed(state.costs)[0] for state in above)
    ran, run_ms = sum(state.rate.jobs for state in states), sum(state.rate.run_ms for state in states)
    cost, slots = sum(state.rate.cost for state in states), sum(state.leased for state in states)
    if ran < KNOWN_JOBS or cost < 1 or slots < 1:
        return Place(jobs, None)
    wait = (ahead * (run_ms / cost) * LANE_CYCLE / (LANE_CYCLE - below) + run_ms / ran / 2) / slots
    return Place(jobs, int(min(wait, MAX_WAIT_MS)))


def _before(here: LaneState, band: int, own: int, tenants: int) -> tuple[int, float]:
    """How many jobs of its own lane go before a job, and what they cost."""
    total, costs = _believed(here.costs)
    if here.waiting <= 0 or not total:
        return 0, 0.0
    at, mean = band - RETRIED, total / here.waiting
    behind = sum(cost > 0 for cost in costs[at + 1 :])
    level = min(own * tenants * mean, costs[at])
    if band == RETRIED:
        cost = level * BAND_STEP / (BAND_STEP - 1) if behind else level
    else:
        bands = sum(costs[1:at])
        retried = min(costs[0], (BAND_STEP - 1) * (bands + level + mean))
        cost = level + min(bands + retried, (BAND_CYCLE - 1) * (level + mean))
        cost = cost * BAND_CYCLE / (BAND_CYCLE - behind)
    cost = min(cost, total)
    return int(cost / mean + 0.5), cost


def _believed(costs: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Their sum, and each, without what cannot be: a queue may have lost some of its count."""
    known = tuple(max(cost, 0) for cost in costs)
    return sum(known), known


def patience_ms(deadline_ms: int, margin: float) -> int:
    """The longest predicted wait with which a request of that deadline is taken in. ``margin`` is by what part a
    prediction may be too long: one that misses its deadline by less is believed to be wrong."""
    return max(1, round(deadline_ms / (1 - margin)))


def is_off_by(predicted_ms: int, waited_ms: int) -> float:
    """The error of a prediction as a part of the real wait."""
    return abs(predicted_ms - waited_ms) / max(waited_ms, 1)
