"""inferq's autoscaler: the product's own functions, asked at the autoscaler's interval."""

from __future__ import annotations

from scheduling.autoscale import ScalingRules, Stabilizer, load_of
from scheduling.capacity import WorkerCapacity

from .port import FleetLoad

INTERVAL_S = 1.0


class InferqAutoscaler:
    """Implements :class:`simulator.scaling.port.Scaler`. Like the real one it learns how long a worker takes to start,
    which is ``start_s``, from the first that it starts."""

    interval_s = INTERVAL_S

    def __init__(self, rules: ScalingRules, start_s: float) -> None:
        self._rules = rules
        self._start_s = start_s
        self._learns_at_s: float | None = None
        self._stabilizer = Stabilizer()
        self._capacity = WorkerCapacity()

    def wanted(self, load: FleetLoad) -> int:
        """How many workers there should be."""
        is_known = self._learns_at_s is not None and load.now_s >= self._learns_at_s
        now_ms, start_up_ms = load.now_s * 1e3, self._start_s * 1e3 if is_known else 0.0
        wish = self._capacity.wish(load_of(load.pool), self._rules, now_ms, start_up_ms=start_up_ms)
        decision = self._stabilizer.decide(wish, load.workers, now_ms, self._rules, start_up_ms=start_up_ms)
        if decision.replicas > load.workers and self._learns_at_s is None:
            self._learns_at_s = load.now_s + self._start_s
        return decision.replicas
