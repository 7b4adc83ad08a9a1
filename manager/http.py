"""The Manager's HTTP API (FastAPI, port 9000 by default); its OpenAPI document is at ``/openapi.json``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Response

from queue_schemas import (
    FABRIC_PREFIX,
    BrokerAddress,
    Heartbeat,
    HeartbeatAnswer,
    PoolDepth,
    PoolList,
    Registration,
    RegistrationAnswer,
    WorkerInfo,
    WorkerList,
)
from queue_schemas.ids import check_incarnation
from telemetry.asgi import error_responses, health_routes, prepare_app, require_join_token
from telemetry.held import WORKERS_PRESENT, Held

from .office import ManagerService

OneRun = Annotated[str, Query(max_length=100, description="the run of the worker that it is about")]


def create_app(service: ManagerService) -> FastAPI:
    """The API of ``service``, which the caller runs."""
    app = FastAPI(
        title="inferq Manager",
        summary="The fleet: who serves which model, and how much waits",
        version="1",
        openapi_tags=[
            {"name": "workers", "description": "Joining, heartbeats, draining. Needs the join token if one is set."},
            {"name": "pools", "description": "Queue depth per model, for people and autoscalers. Needs the token too."},
            {"name": "health", "description": "Liveness, readiness, Prometheus metrics."},
        ],
    )
    registry = service.metrics.registry
    prepare_app(app, registry)
    app.include_router(health_routes(registry, service.not_ready, service.show_metrics))
    app.include_router(_worker_routes(service), prefix=FABRIC_PREFIX)
    app.include_router(_pool_routes(service), prefix=FABRIC_PREFIX)
    return app


def _worker_routes(service: ManagerService) -> APIRouter:
    token = service.settings.join_token.get_secret_value()
    held = Held(lambda: service.stopping or not service.acting)
    service.metrics.registry.watch_gauge("inferq_workers_present", WORKERS_PRESENT, lambda: held.count)
    routes = APIRouter(tags=["workers"], dependencies=[Depends(require_join_token(token))])

    @routes.post("/workers", summary="Register, or register again", responses=error_responses(400, 401, 409, 413, 503))
    async def register(registration: Registration) -> RegistrationAnswer:
        return await service.register(registration)

    @routes.get("/workers", summary="The fleet", responses=error_responses(401, 503))
    async def list_workers() -> WorkerList:
        return await service.list_workers()

    @routes.post(
        "/workers/{worker_id}/heartbeat",
        summary="Tell how a worker is; answers its assignment",
        responses=error_responses(400, 401, 410, 413, 503),
    )
    async def heartbeat(worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        return await service.heartbeat(worker_id, heartbeat)

    @routes.delete(
        "/workers/{worker_id}",
        summary="Deregister one incarnation",
        status_code=204,
        response_class=Response,
        responses=error_responses(400, 401, 410, 503),
    )
    async def deregister(
        worker_id: str, incarnation: str = Query(max_length=100, description="the run of the worker that leaves")
    ) -> None:
        await service.deregister(worker_id, incarnation)

    @routes.post(
        "/workers/{worker_id}/drain",
        summary="Let a worker finish what it runs, then end",
        status_code=202,
        responses=error_responses(400, 401, 410, 503),
    )
    async def drain(worker_id: str) -> WorkerInfo:
        return await service.drain(worker_id)

    @routes.get(
        "/workers/{worker_id}/presence",
        summary="Held open by a worker while it lives; when it breaks, the worker is doubted at once",
        response_class=Response,
        responses=error_responses(400, 401, 429, 503),
    )
    async def presence(worker_id: str, incarnation: OneRun) -> Response:
        service.check_acting()
        run = check_incarnation(incarnation)
        return held.answer(lambda: service.doubt(worker_id, run))

    @routes.post(
        "/workers/{worker_id}/doubt",
        summary="Its connection broke: look whether this run of a worker is dead",
        status_code=202,
        response_class=Response,
        responses=error_responses(400, 401, 503),
    )
    async def doubt(worker_id: str, incarnation: OneRun) -> None:
        await service.doubt(worker_id, check_incarnation(incarnation))

    @routes.get("/broker", summary="Where the queue is", responses=error_responses(401, 503))
    async def broker() -> BrokerAddress:
        return await service.broker_address()

    return routes


def _pool_routes(service: ManagerService) -> APIRouter:
    token = service.settings.join_token.get_secret_value()
    routes = APIRouter(tags=["pools"], dependencies=[Depends(require_join_token(token))])

    @routes.get("/pools", summary="Every model's queue", responses=error_responses(401, 503))
    async def pools() -> PoolList:
        return await service.pools()

    @routes.get("/pools/{model:path}", summary="One model's queue", responses=error_responses(401, 404, 503))
    async def pool(model: str) -> PoolDepth:
        return await service.pool(model)

    return routes
