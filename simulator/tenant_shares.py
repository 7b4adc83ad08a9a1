"""How fairly tenants are served while several of them have work waiting."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from queue_schemas.lanes import Lane

from .requests import Request

WINDOW_S = 60.0
CACHED_PROMPT_TOKEN, PROMPT_TOKEN, OUTPUT_TOKEN = 0.1, 1.0, 2.0
"""What a token counts for: prompt and output as in VTC (Sheng et al.: Fairness in Serving Large Language Models, OSDI
2024)."""


class TenantShares:
    """Service by lane and tenant in windows of ``WINDOW_S``. A prompt counts where its request begins, the output where
    it ends.

    ``weights`` are by tenant, 1 for others.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._waiting: dict[tuple[Lane, str], int] = defaultdict(int)
        self._was_idle: set[tuple[Lane, str]] = set()
        self._service: dict[tuple[Lane, str], float] = defaultdict(float)
        self._ratios: list[float] = []

    def arrived(self, request: Request) -> None:
        """``request`` waits."""
        self._waiting[request.lane, request.tenant] += 1

    def started(self, request: Request) -> None:
        """``request`` waits no more."""
        self._stops_waiting(request)
        uncached = request.prompt_tokens - request.cached
        service = uncached * PROMPT_TOKEN + request.cached * CACHED_PROMPT_TOKEN
        self._service[request.lane, request.tenant] += service

    def finished(self, request: Request) -> None:
        """``request`` has its last token."""
        self._service[request.lane, request.tenant] += request.output_tokens * OUTPUT_TOKEN

    def failed(self, request: Request) -> None:
        """``request``, which waited, will not run."""
        self._stops_waiting(request)

    def close_window(self) -> None:
        """``WINDOW_S`` have passed since the last call."""
        served: dict[Lane, list[float]] = defaultdict(list)
        for key, waiting in self._waiting.items():
            if waiting and key not in self._was_idle:
                lane, tenant = key
                served[lane].append(self._service[key] / self._weights.get(tenant, 1.0))
        self._ratios += [
            min(of_lane) / max(of_lane) for of_lane in served.values() if len(of_lane) > 1 and max(of_lane)
        ]
        self._service.clear()
        self._was_idle = {key for key, waiting in self._waiting.items() if not waiting}

    def fairness(self) -> float | None:
        """See :class:`simulator.measures.Summary`."""
        return statistics.median(self._ratios) if self._ratios else None

    def _stops_waiting(self, request: Request) -> None:
        key = (request.lane, request.tenant)
        self._waiting[key] -= 1
        if not self._waiting[key]:
            self._was_idle.add(key)
