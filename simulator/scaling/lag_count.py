"""Scaling by the number of waiting requests, as KEDA's scalers for queues do through a HorizontalPodAutoscaler.

Replicas are the lag over a threshold for each of them. The rest are Kubernetes' defaults
(https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/): a decision every 15 s, at most the double
or four more at a time, and fewer only once the lag asked for fewer throughout five minutes.
"""

from __future__ import annotations

import math
from collections import deque

from .port import FleetLoad

INTERVAL_S = 15.0
STABILIZATION_S = 300.0
_MORE_AT_ONCE = 4


class LagCount:
    """Implements :class:`simulator.scaling.port.Scaler`. ``with_running``: requests that run count too, as they do
    where the metric is a queue's length until acknowledgement."""

    interval_s = INTERVAL_S

    def __init__(self, *, threshold: int, least: int, most: int, with_running: bool) -> None:
        self._threshold = threshold
        self._least = least
        self._most = most
        self._with_running = with_running
        self._recent: deque[tuple[float, int]] = deque()

    def wanted(self, load: FleetLoad) -> int:
        """How many workers there should be."""
        lag = load.pool.outstanding if self._with_running else load.pool.waiting
        asked = min(max(math.ceil(lag / self._threshold), self._least), self._most)
        recent = self._recent
        recent.append((load.now_s, asked))
        while recent[0][0] < load.now_s - STABILIZATION_S:
            recent.popleft()
        if asked > load.workers:
            return min(asked, max(load.workers * 2, load.workers + _MORE_AT_ONCE))
        return min(max(one for _, one in recent), load.workers)
