"""How many jobs one worker serves at most, learnt in moments in which all workers of a pool were full.

Slots do not say it. An engine computes the jobs of a step together, so each takes longer the more there are: twenty
workers with two jobs each look as if two workers with twenty each could do the same, and they cannot. An autoscaler
that believes it shrinks the fleet until jobs wait, grows it to far more than is needed, and so on, under a load that
does not change. So what full workers serve is measured, and remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from queue_schemas import Lane

from .autoscale import LaneLoad, PoolLoad, ScalingRules, Wish, replicas_wanted

FULL_AFTER_MS = 1_000
"""Workers are full once a job has waited so long behind all their slots. A moment's burst fills slots of workers that
would adapt them and take more (:mod:`scheduling.slots`)."""
LEARN_MS = 10_000
"""A measurement replaces what was known with this time constant."""
DOUBLE_MS = 12 * 3_600_000
"""What no full worker confirmed for so long is believed to have doubled: engines and jobs change, and a fleet that is
never full would never find out."""
FORGET_MS = 10 * DOUBLE_MS
"""What none confirmed for so long is forgotten."""
_MAX_PER_S, _MAX_COST = 1e6, 1e15
"""No worker serves more, no job costs more, nor is more served in a second: what says so is no measurement."""


@dataclass(slots=True)
class WorkerCapacity:
    """What one worker of a pool serves when it is full, in cost a second (:mod:`scheduling.cost`), and what an
    interactive job costs, as an autoscaler sees them over time. ``now_ms`` is any clock that never goes back."""

    _cost_per_s: float = 0.0
    _job_cost: float = 0.0
    _confirmed_ms: float = 0.0
    _looked_ms: float = 0.0

    def wish(self, load: PoolLoad, rules: ScalingRules, now_ms: float, *, start_up_ms: float = 0) -> Wish:
        """What ``load`` calls for (:func:`scheduling.autoscale.replicas_wanted`) with what is known of its workers. It
        is learnt from, if it can be believed."""
        wish = replicas_wanted(load, rules, start_up_ms=start_up_ms, worker_per_s=self.per_s(now_ms))
        if wish.replicas is not None:
            self._learn(load, now_ms)
        return wish

    def per_s(self, now_ms: float) -> float | None:
        """Interactive jobs a second that one worker serves at most; None while unknown."""
        believed = self._believed(now_ms)
        return min(believed / self._job_cost, _MAX_PER_S) if believed and self._job_cost else None

    def _learn(self, load: PoolLoad, now_ms: float) -> None:
        passed_ms, self._looked_ms = now_ms - self._looked_ms, now_ms
        share = passed_ms / (LEARN_MS + passed_ms)
        lanes = load.lanes.values()
        interactive = load.lanes.get(Lane.INTERACTIVE, LaneLoad())
        if interactive.usual_run_ms and interactive.ms_per_cost:
            job_cost = min(interactive.usual_run_ms / interactive.ms_per_cost, _MAX_COST)
            self._job_cost += (job_cost - self._job_cost) * (share if self._job_cost else 1.0)
        leased = sum(lane.leased for lane in lanes)
        is_full = leased >= load.slots and any(one.waiting and one.oldest_age_ms >= FULL_AFTER_MS for one in lanes)
        served = [lane.leased / lane.ms_per_cost for lane in lanes if lane.leased and lane.ms_per_cost]
        if is_full and load.workers and load.slots and served:
            cost_per_s, before = min(1000 * sum(served) / load.workers, _MAX_COST), self._believed(now_ms)
            self._cost_per_s = before + (cost_per_s - before) * (share if before else 1.0)
            self._confirmed_ms = now_ms

    def _believed(self, now_ms: float) -> float:
        unconfirmed_ms = now_ms - self._confirmed_ms
        return self._cost_per_s * 2.0 ** (unconfirmed_ms / DOUBLE_MS) if unconfirmed_ms < FORGET_MS else 0.0
