"""``/fabric/v1/pools``: depth, age, workers and slots of each model's queue, for dashboards and autoscalers."""

from __future__ import annotations

from fastapi import APIRouter

from queue_schemas import FABRIC_PREFIX, PoolDepth, PoolList
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from .pool_figures import PoolFigures


def pool_routes(figures: PoolFigures, gate: Gate) -> APIRouter:
    """Shows all pools, or one."""
    routes = APIRouter(tags=["fabric"], dependencies=[gate.allow(Access.CLIENT_OR_MEMBER)])

    @routes.get(
        f"{FABRIC_PREFIX}/pools",
        summary="Queue depth, age, workers and slots of every model",
        responses=error_responses(401, 503),
    )
    async def pools() -> PoolList:
        return await figures.pools()

    @routes.get(
        f"{FABRIC_PREFIX}/pools/{{model:path}}",
        summary="The same of one model, for autoscalers",
        responses=error_responses(401, 404, 503),
    )
    async def pool(model: str) -> PoolDepth:
        return await figures.pool(model)

    return routes
