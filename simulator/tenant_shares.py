"""How fairly tenants are served while several of them have work waiting."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from .requests import Request

WINDOW_S = 60.0
CACHED_PROMPT_TOKEN, PROMPT_TOKEN, OUTPUT_TOKEN = 0.1, 1.0, 2.0
"""What a token counts for: prompt and output as in VTC (Sheng et al.: Fairness in Serving Large Language Models, OSDI
2024)."""


class TenantShares:
    """Service by tenant in windows of ``WINDOW_S``. A prompt counts where its request begins, the output where it ends.

    ``weights`` are by tenant, 1 for others.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._waiting: dict[str, int] = defaultdict(int)
        self._was_idle: set[str] = set()
        self._service: dict[str, float] = defaultdict(float)
        self._ratios: list[float] = []

    def arrived(self, request: Request) -> None:
        """``request`` waits."""
        self._waiting[request.tenant] += 1

    def started(self, request: Request) -> None:
        """``request`` waits no more."""
        self._stops_waiting(request.tenant)
        uncached = request.prompt_tokens - request.cached
        self._service[request.tenant] += uncached * PROMPT_TOKEN + request.cached * CACHED_PROMPT_TOKEN

    def finished(self, request: Request) -> None:
        """``request`` has its last token."""
        self._service[request.tenant] += request.output_tokens * OUTPUT_TOKEN

    def failed(self, request: Request) -> None:
        """``request``, which waited, will not run."""
        self._stops_waiting(request.tenant)

    def close_window(self) -> None:
        """``WINDOW_S`` have passed since the last call."""
        backlogged = [tenant for tenant, waiting in self._waiting.items() if waiting and tenant not in self._was_idle]
        if len(backlogged) > 1:
            served = [self._service[tenant] / self._weights.get(tenant, 1.0) for tenant in backlogged]
            self._ratios.append(min(served) / max(served) if max(served) else 1.0)
        self._service.clear()
        self._was_idle = {tenant for tenant, waiting in self._waiting.items() if not waiting}

    def fairness(self) -> float | None:
        """See :class:`simulator.measures.Summary`."""
        return statistics.median(self._ratios) if self._ratios else None

    def _stops_waiting(self, tenant: str) -> None:
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            self._was_idle.add(tenant)
