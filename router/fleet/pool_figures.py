"""``PoolFigures`` says how the pools are, for the pages of pools and for ``inferq_replicas_wanted``."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from queue_schemas import InferqError, PoolDepth, PoolList
from scheduling.autoscale import ScalingRules

from ..model_directory import check_model, pool_list, pool_of
from ..queue_link import QueueLink
from .recent_depths import RecentDepths

_SCRAPE_LIMIT_S = 2.0


class PoolFigures:
    """Depth, age, workers and slots of each model's queue, and the workers that it calls for by ``rules``."""

    def __init__(self, link: QueueLink, rules: ScalingRules) -> None:
        self._link = link
        self._rules = rules
        self._recent = RecentDepths(link)

    async def pools(self) -> PoolList:
        """Of all models. Raises ``BrokerUnavailable``."""
        return pool_list(self._link.directory, await self._recent.get(), self._rules)

    async def pool(self, model: str) -> PoolDepth:
        """Of one model. Raises ``BrokerUnavailable`` and ``ModelNotFound``."""
        depths = await self._recent.get()
        known = {pool: lanes for pool, lanes in depths.items() if pool == model}
        if not known and model not in self._link.directory.pools:
            check_model(model, await self._link.fresh_directory(), "queue")
        return pool_of(model, self._link.directory, next(iter(known.values()), {}), self._rules)

    async def render_metrics(self) -> bytes:
        """``inferq_replicas_wanted`` for Prometheus. It stands in no registry: each process of a Router says the same,
        which must not be added up. Without samples while the queue does not answer: no value is better than an old
        one."""
        page = CollectorRegistry()
        gauge = Gauge("inferq_replicas_wanted", "Workers that a model's queue calls for now", ("model",), registry=page)
        try:
            async with asyncio.timeout(_SCRAPE_LIMIT_S):
                pools = (await self.pools()).pools
        except (InferqError, TimeoutError):
            pools = []
        for pool in pools:
            if pool.replicas_wanted is not None:
                gauge.labels(pool.model).set(pool.replicas_wanted)
        return generate_latest(page)
