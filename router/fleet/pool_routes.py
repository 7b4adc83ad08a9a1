"""``/fabric/v1/pools``: depth, age, workers and slots of each model's queue, for dashboards and autoscalers."""

from __future__ import annotations

from fastapi import APIRouter

from queue_schemas import FABRIC_PREFIX, PoolDepth, PoolList
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..model_directory import check_model, pool_list, pool_of
from ..queue_link import QueueLink
from .recent_depths import RecentDepths


def pool_routes(link: QueueLink, gate: Gate) -> APIRouter:
    """Shows all pools, or one."""
    recent = RecentDepths(link)
    routes = APIRouter(tags=["fabric"], dependencies=[gate.allow(Access.CLIENT_OR_MEMBER)])

    @routes.get(
        f"{FABRIC_PREFIX}/pools",
        summary="Queue depth, age, workers and slots of every model",
        responses=error_responses(401, 503),
    )
    async def pools() -> PoolList:
        return pool_list(link.directory, await recent.get())

    @routes.get(
        f"{FABRIC_PREFIX}/pools/{{model:path}}",
        summary="The same of one model, for autoscalers",
        responses=error_responses(401, 404, 503),
    )
    async def pool(model: str) -> PoolDepth:
        depths = await recent.get()
        known = {pool: lanes for pool, lanes in depths.items() if pool == model}
        if not known and model not in link.directory.pools:
            check_model(model, await link.fresh_directory(), "queue")
        return pool_of(model, link.directory, next(iter(known.values()), {}))

    return routes
