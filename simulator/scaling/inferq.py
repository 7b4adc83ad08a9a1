"""inferq's autoscaler: the product's own functions, asked at the autoscaler's interval."""

from __future__ import annotations

from scheduling.autoscale import ScalingRules, Stabilizer, load_of, replicas_wanted

from .port import FleetLoad

INTERVAL_S = 1.0


class InferqAutoscaler:
    """Implements :class:`simulator.scaling.port.Scaler`."""

    interval_s = INTERVAL_S

    def __init__(self, rules: ScalingRules, start_s: float) -> None:
        self._rules = rules
        self._start_up_ms = start_s * 1e3
        self._stabilizer = Stabilizer()

    def wanted(self, load: FleetLoad) -> int:
        """How many workers there should be."""
        wish = replicas_wanted(load_of(load.pool), self._rules, start_up_ms=self._start_up_ms)
        now_ms = load.now_s * 1e3
        decision = self._stabilizer.decide(wish, load.workers, now_ms, self._rules, start_up_ms=self._start_up_ms)
        return decision.replicas
