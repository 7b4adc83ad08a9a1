"""The Manager's HTTP API (FastAPI, port 9000 by default); its OpenAPI document is at ``/openapi.json``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response, params

from queue_schemas import (
    FABRIC_PREFIX,
    BrokerAddress,
    Heartbeat,
    HeartbeatAnswer,
    ManagerUnavailable,
    PoolDepth,
    PoolList,
    Registration,
    RegistrationAnswer,
    SessionId,
    WorkerInfo,
    WorkerList,
    check_worker_id,
)
from queue_schemas.fleet.messages import AutoscalerAnswer, AutoscalerClaim
from queue_schemas.ids import check_session_id
from telemetry import get_logger
from telemetry.http.access import allow_members
from telemetry.http.app import health_routes, prepare_app
from telemetry.http.error_answers import error_responses
from telemetry.http.fabric_calls import FabricCall
from telemetry.http.loopback_access import LoopbackAccess
from telemetry.http.openapi import FLEET, add_security
from telemetry.http.session_connections import OPEN_SESSIONS, SessionConnections

from .control_plane import ManagerService
from .forwarding import forward_request
from .leadership import NotActing

log = get_logger(__name__)

SessionParameter = Annotated[str, Query(max_length=100, description="the session of the worker")]


def create_app(service: ManagerService) -> FastAPI:
    """The API of ``service``, which the caller runs."""
    app = FastAPI(
        title="inferq Manager",
        summary="The fleet: who serves which model, and how much waits",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_tags=[
            {"name": "workers", "description": "Joining, heartbeats, draining. Needs the join token if one is set."},
            {"name": "pools", "description": "Queue depth per model, for people and autoscalers. Needs the token too."},
            {"name": "health", "description": "Liveness, readiness, Prometheus metrics."},
        ],
    )
    registry = service.metrics.registry
    guarded = bool(service.settings.join_token.get_secret_value())
    fleet = FLEET if guarded else [*FLEET, {}]
    prepare_app(app, registry, describe=lambda document: add_security(document, [(FABRIC_PREFIX, fleet)]))
    app.add_exception_handler(NotActing, partial(_pass_on, service))
    app.include_router(health_routes(registry, service.not_ready, service.show_metrics))
    app.include_router(_worker_routes(service), prefix=FABRIC_PREFIX)
    app.include_router(_pool_routes(service), prefix=FABRIC_PREFIX)
    return app


async def _pass_on(service: ManagerService, request: Request, error: Exception) -> Response:
    assert isinstance(error, NotActing)  # noqa: S101 - what the handler is registered for
    return await forward_request(service.acting_manager, request, error)


async def _check_session(service: ManagerService, worker_id: str, session_id: SessionId, request_id: str) -> None:
    """The connection that a worker session held here broke: check it, or have the acting Manager do so."""
    try:
        await service.check(worker_id, session_id)
    except NotActing:
        path = f"{FABRIC_PREFIX}/workers/{check_worker_id(worker_id)}/check"
        token = service.settings.join_token.get_secret_value()
        call = FabricCall("POST", path, f"session_id={session_id}", token, b"", request_id, by_manager=True)
        try:
            await service.acting_manager.forward(call)
        except ManagerUnavailable as error:
            log.info("check_not_requested", worker=worker_id, error=error.message, then="its heartbeats become overdue")


def _members(service: ManagerService) -> params.Depends:
    settings = service.settings
    local = LoopbackAccess.of(settings.host, insecure=settings.insecure)
    return allow_members(settings.join_token.get_secret_value(), local)


def _worker_routes(service: ManagerService) -> APIRouter:
    connections = SessionConnections(lambda: service.stopping or not service.reaches_acting)
    service.metrics.registry.watch_gauge("inferq_session_connections", OPEN_SESSIONS, lambda: connections.count)
    routes = APIRouter(tags=["workers"], dependencies=[_members(service)])

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
        summary="Deregister one session",
        status_code=204,
        response_class=Response,
        responses=error_responses(400, 401, 410, 503),
    )
    async def deregister(worker_id: str, session_id: SessionParameter) -> None:
        await service.deregister(worker_id, session_id)

    @routes.post(
        "/workers/{worker_id}/drain",
        summary="Let a worker finish what it runs, then end",
        status_code=202,
        responses=error_responses(400, 401, 410, 503),
    )
    async def drain(worker_id: str) -> WorkerInfo:
        return await service.drain(worker_id)

    @routes.get(
        "/workers/{worker_id}/session",
        summary="Held open by a worker session while it lives; when it breaks, the session is checked at once",
        response_class=Response,
        responses=error_responses(400, 401, 429, 503),
    )
    async def hold_session_connection(worker_id: str, session_id: SessionParameter, request: Request) -> Response:
        service.require_acting_reached()
        session = check_session_id(session_id)
        return connections.answer(lambda: _check_session(service, worker_id, session, request.state.request_id))

    @routes.post(
        "/workers/{worker_id}/check",
        summary="The connection of this worker session broke: find out whether it is dead",
        status_code=202,
        response_class=Response,
        responses=error_responses(400, 401, 503),
    )
    async def check(worker_id: str, session_id: SessionParameter) -> None:
        await service.check(worker_id, check_session_id(session_id))

    @routes.post(
        "/autoscalers",
        summary="An autoscaler acts for a pool, or goes on doing so",
        responses=error_responses(400, 401, 413, 503),
    )
    async def claim_pool(claim: AutoscalerClaim) -> AutoscalerAnswer:
        return await service.claim_pool(claim)

    @routes.get("/broker", summary="Where the queue is", responses=error_responses(401, 503))
    async def broker() -> BrokerAddress:
        return await service.broker_address()

    return routes


def _pool_routes(service: ManagerService) -> APIRouter:
    routes = APIRouter(tags=["pools"], dependencies=[_members(service)])

    @routes.get("/pools", summary="Every model's queue", responses=error_responses(401, 503))
    async def pools() -> PoolList:
        return await service.pools()

    @routes.get("/pools/{model:path}", summary="One model's queue", responses=error_responses(401, 404, 503))
    async def pool(model: str) -> PoolDepth:
        return await service.pool(model)

    return routes
