"""The Manager's paths under ``/fabric/v1``, passed on to the Manager for workers that only reach the Router.

The Router checks the join token itself: its own address may be public where the Manager's is not, and a Manager that
only this machine reaches may have no token to ask for.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    BadRequest,
    BodyTooLarge,
    BrokerAddress,
    Heartbeat,
    HeartbeatAnswer,
    ManagerUnavailable,
    Registration,
    RegistrationAnswer,
    WorkerInfo,
    WorkerList,
    check_worker_id,
)
from queue_schemas.fleet.messages import AutoscalerAnswer, AutoscalerClaim
from queue_schemas.ids import check_session_id
from telemetry import MetricsRegistry, get_logger
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses
from telemetry.http.fabric_calls import FabricCall
from telemetry.http.session_connections import OPEN_SESSIONS, SessionConnections

from ..http.access import Gate
from ..http.json_body import body_schema
from ..lifecycle import Lifecycle
from ..ports import ManagerPort

MAX_FABRIC_BODY_BYTES = 1024 * 1024
_WORKERS = f"{FABRIC_PREFIX}/workers"
_WORKER = _WORKERS + "/{worker_id}"
_SESSION = {
    "parameters": [
        {"name": "session_id", "in": "query", "required": True, "schema": {"type": "string", "maxLength": 100}}
    ]
}

log = get_logger(__name__)


def manager_routes(
    manager: ManagerPort | None, gate: Gate, registry: MetricsRegistry, lifecycle: Lifecycle
) -> APIRouter:
    """``manager`` is None for a Router without one: every call is then refused with ``ManagerUnavailable``. A shutdown
    ends the session connections that workers hold open."""
    routes = APIRouter(tags=["manager"], dependencies=[gate.allow(Access.MEMBER)])
    connections = SessionConnections(lambda: lifecycle.shutting_down)
    registry.watch_gauge("inferq_session_connections", OPEN_SESSIONS, lambda: connections.count)

    async def forward(request: Request, path: str) -> Response:
        return await _forward(_present(manager), request, path)

    @routes.get(_WORKERS, summary="The fleet", response_model=WorkerList, responses=error_responses(401, 503))
    async def workers(request: Request) -> Response:
        return await forward(request, _WORKERS)

    @routes.post(
        _WORKERS,
        summary="A worker joins",
        response_model=RegistrationAnswer,
        responses=error_responses(400, 401, 409, 413, 503),
        openapi_extra=body_schema(Registration),
    )
    async def register(request: Request) -> Response:
        return await forward(request, _WORKERS)

    @routes.post(
        _WORKER + "/heartbeat",
        summary="A worker reports",
        response_model=HeartbeatAnswer,
        responses=error_responses(400, 401, 410, 413, 503),
        openapi_extra=body_schema(Heartbeat),
    )
    async def heartbeat(worker_id: str, request: Request) -> Response:
        return await forward(request, f"{_WORKERS}/{check_worker_id(worker_id)}/heartbeat")

    @routes.post(
        _WORKER + "/drain",
        summary="A worker takes no more work, and ends",
        status_code=202,
        response_model=WorkerInfo,
        responses=error_responses(400, 401, 410, 503),
    )
    async def drain(worker_id: str, request: Request) -> Response:
        return await forward(request, f"{_WORKERS}/{check_worker_id(worker_id)}/drain")

    @routes.get(
        _WORKER + "/session",
        summary="Held open by a worker session while it lives",
        response_class=Response,
        responses=error_responses(400, 401, 429, 503),
    )
    async def hold_session_connection(worker_id: str, session_id: str, request: Request) -> Response:
        token = request.headers.get(JOIN_TOKEN_HEADER, "")
        path = f"{_WORKERS}/{check_worker_id(worker_id)}/check"
        query = f"session_id={check_session_id(session_id)}"
        call = FabricCall("POST", path, query, token, b"", request.state.request_id)
        found = _present(manager)
        return connections.answer(lambda: _request_check(found, call))

    @routes.post(
        _WORKER + "/check",
        summary="Check a worker whose connection broke",
        status_code=202,
        response_class=Response,
        responses=error_responses(400, 401, 503),
        openapi_extra=_SESSION,
    )
    async def check(worker_id: str, request: Request) -> Response:
        return await forward(request, f"{_WORKERS}/{check_worker_id(worker_id)}/check")

    @routes.delete(
        _WORKER,
        summary="A worker leaves",
        status_code=204,
        response_class=Response,
        responses=error_responses(400, 401, 410, 503),
        openapi_extra=_SESSION,
    )
    async def deregister(worker_id: str, request: Request) -> Response:
        return await forward(request, f"{_WORKERS}/{check_worker_id(worker_id)}")

    @routes.post(
        f"{FABRIC_PREFIX}/autoscalers",
        summary="An autoscaler acts for a pool",
        response_model=AutoscalerAnswer,
        responses=error_responses(400, 401, 413, 503),
        openapi_extra=body_schema(AutoscalerClaim),
    )
    async def claim_pool(request: Request) -> Response:
        return await forward(request, f"{FABRIC_PREFIX}/autoscalers")

    @routes.get(
        f"{FABRIC_PREFIX}/broker",
        summary="Where the queue is",
        response_model=BrokerAddress,
        responses=error_responses(401, 503),
    )
    async def broker(request: Request) -> Response:
        return await forward(request, f"{FABRIC_PREFIX}/broker")

    return routes


async def _request_check(manager: ManagerPort, call: FabricCall) -> None:
    """Ask the Manager to check a worker whose session connection broke."""
    try:
        await manager.forward(call)
    except ManagerUnavailable as error:
        log.info(
            "check_not_requested",
            path=call.path,
            error=error.message,
            then="its heartbeats become overdue",
        )


def _present(manager: ManagerPort | None) -> ManagerPort:
    if manager is None:
        why = "this router was started without --manager-url: ask the Manager itself"
        raise ManagerUnavailable(why, public=why)
    return manager


async def _forward(manager: ManagerPort, request: Request, path: str) -> Response:
    """The Manager's answer to the request of a member of the fleet."""
    token = request.headers.get(JOIN_TOKEN_HEADER, "")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FABRIC_BODY_BYTES:
                raise BodyTooLarge(
                    f"the body has more than {MAX_FABRIC_BODY_BYTES} bytes: no worker's message has so many"
                )
    except ClientDisconnect:
        raise BadRequest("the body was cut short: send it again") from None
    answer = await manager.forward(
        FabricCall(request.method, path, request.url.query, token, body, request.state.request_id)
    )
    if request.method != "GET" and not path.endswith(("/heartbeat", "/autoscalers")):
        log.info("forwarded_to_manager", method=request.method, path=path, status=answer.status)
    return Response(answer.body, answer.status, headers=dict(answer.headers))
