"""Preemption: which running attempts of lower lanes yield to interactive jobs that find no free slot.

The queue asks (``broker/lua/lib/preemption.lua`` decides as :func:`yields_wanted` and :func:`victim` do; the contract
suite compares them), a worker agrees (:class:`YieldPolicy`), and the attempt goes on later behind what it said.

Rules:

* One attempt is asked for each interactive job that waits. One that was asked and still runs is asked again after
  :data:`ASK_AGAIN_MS` at the earliest.
* The attempt that began last yields first: it has the least to compute again, and old ones come to their end.
* Lower lanes keep the part of what runs that claims would give them under a saturating interactive load, so that their
  starvation bounds stand.
* A worker declines while a slot of its own is free or about to be. Beyond a share of its slots in any second it waits
  until the share allows one more, if no slot becomes free before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from queue_schemas.ids import JobId
from queue_schemas.lanes import LANE_CYCLE, LANES, Lane

ASK_AGAIN_MS = 2_000
LOWER_PART = LANE_CYCLE // (len(LANES) - 1)
"""Lower lanes keep one of so many of the jobs that run: each is first in one of ``LANE_CYCLE`` claims."""
_WINDOW_S = 1.0
_DECAY = 1 / 16
"""Weight of the newest run time in the mean of all."""


@dataclass(frozen=True, slots=True)
class Yieldable:
    """A running attempt that may yield. Times are the queue's (ms); ``asked_at``: None if it was not asked."""

    job_id: JobId
    started_at: int
    asked_at: int | None = None


def yields_wanted(waiting: int, lower: int, interactive: int, attempts: Iterable[Yieldable], now: int) -> bool:
    """Whether one more attempt should yield to the ``waiting`` interactive jobs of a pool, of which ``lower`` jobs of
    lower lanes and ``interactive`` ones run."""
    if lower * LOWER_PART <= lower + interactive:
        return False
    asked = sum(1 for one in attempts if one.asked_at is not None and now - one.asked_at < ASK_AGAIN_MS)
    return asked < waiting


def victim(attempts: Iterable[Yieldable], now: int) -> Yieldable | None:
    """The attempt that yields next: the one that began last, then the one that was asked longest ago; None: none may be
    asked now."""
    may = [one for one in attempts if one.asked_at is None or now - one.asked_at >= ASK_AGAIN_MS]
    return max(may, key=_order, default=None)


def _order(one: Yieldable) -> tuple[int, str]:
    return (one.started_at if one.asked_at is None else -one.asked_at, one.job_id)


@dataclass(slots=True)
class YieldPolicy:
    """When one worker agrees to yield. ``share``: at most this part of its slots yields in a second, at least one.
    ``min_gain_s``: nothing yields if a slot is expected to become free within that. Times are seconds of one monotonic
    clock."""

    share: float
    min_gain_s: float
    mean_run_s: dict[Lane, float] = field(default_factory=dict)
    """By lane: decayed mean of the run times of attempts that came to their end."""
    _yielded_at: deque[float] = field(default_factory=deque)

    def ran(self, lane: Lane, run_s: float) -> None:
        """An attempt of ``lane`` came to its end after ``run_s``."""
        mean = self.mean_run_s.setdefault(lane, run_s)
        self.mean_run_s[lane] = mean + _DECAY * (run_s - mean)

    def slot_due_s(self, running: Mapping[Lane, int]) -> float:
        """How long until one of the attempts that run, so many of each lane, is expected to end: each does so at the
        rate of its lane, and of a lane of which none has ended nothing is expected."""
        rates = (count / max(self.mean_run_s[lane], 1e-6) for lane, count in running.items() if lane in self.mean_run_s)
        rate = sum(rates)
        return 1 / rate if rate else inf

    def refusal(self, now: float, slots: int, running: Mapping[Lane, int], *, free: int) -> str:
        """Why nothing yields now, as a metric's label; empty if an attempt may. ``running``: by lane, what ``slots``
        run. ``free``: slots that an interactive job may get without one."""
        if free > 0:
            return "slot_free"
        if self.slot_due_s(running) < self.min_gain_s:
            return "slot_due"
        return "share" if self.share_due_s(now, slots) > 0 else ""

    def share_due_s(self, now: float, slots: int) -> float:
        """How long until the share allows one more attempt to yield; 0: it does."""
        while self._yielded_at and now - self._yielded_at[0] >= _WINDOW_S:
            self._yielded_at.popleft()
        beyond = len(self._yielded_at) - max(int(self.share * slots), 1)
        return self._yielded_at[beyond] + _WINDOW_S - now if beyond >= 0 else 0.0

    def yielded(self, now: float) -> None:
        """An attempt was stopped to yield."""
        self._yielded_at.append(now)
