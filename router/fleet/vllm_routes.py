"""``/health``, ``/ping``, ``/version`` and ``/load`` as vLLM's server has them, about the Router itself, so that
probes, load
balancers and benchmark tools made for one vLLM work with a fleet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version

from fastapi import APIRouter, Response
from pydantic import BaseModel

from queue_schemas import BrokerUnavailable, ShuttingDown
from telemetry.http.access import Access, allow
from telemetry.http.error_answers import error_responses

from ..lifecycle import Lifecycle

_RETRY_AFTER_S = 5


class Version(BaseModel):
    """Of inferq: the engines of a fleet may differ."""

    version: str


class Load(BaseModel):
    """How many requests this Router serves now."""

    server_load: int


def vllm_routes(
    reasons: Callable[[], Sequence[str]], lifecycle: Lifecycle, open_requests: Callable[[], Awaitable[int]]
) -> APIRouter:
    """Public routes, as ``/readyz`` is. ``reasons``: why the Router is not ready."""
    routes = APIRouter(tags=["health"], dependencies=[allow(Access.PUBLIC)])

    async def health() -> Response:
        if why := reasons():
            error = ShuttingDown if lifecycle.shutting_down else BrokerUnavailable
            raise error(f"the router is not ready: {why[0]}", retry_after_s=_RETRY_AFTER_S)
        return Response(status_code=200)

    for path, methods in (("/health", ("GET",)), ("/ping", ("GET", "POST"))):
        for method in methods:
            routes.add_api_route(
                path,
                health,
                methods=[method],
                summary="Whether requests are served (200), or why not (503)",
                response_class=Response,
                responses=error_responses(503),
            )

    @routes.get("/version", summary="The version of inferq")
    async def show_version() -> Version:
        return Version(version=version("inferq"))

    @routes.get("/load", summary="How many requests this Router serves now")
    async def load() -> Load:
        return Load(server_load=await open_requests())

    return routes
