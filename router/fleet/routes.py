"""Models, pools, dead letters, and what is passed on to the Manager: the paths of the fleet."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from broker import MAX_LETTERS
from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    BadRequest,
    BodyTooLarge,
    BrokerAddress,
    DeadLetterIds,
    DeadLetterList,
    DeadRequest,
    Heartbeat,
    HeartbeatAnswer,
    ManagerUnavailable,
    PathNotFound,
    PoolDepth,
    PoolList,
    Registration,
    RegistrationAnswer,
    Removed,
    WorkerInfo,
    WorkerList,
    check_worker_id,
)
from queue_schemas.ids import check_session_id
from telemetry import get_logger
from telemetry.http.access import Access
from telemetry.http.asgi import error_responses
from telemetry.http.fabric_calls import FabricCall
from telemetry.http.held_connections import WORKERS_PRESENT, Held

from ..model_directory import check_model, model_list, model_object, pool_list, pool_of
from ..ports import ManagerPort
from ..state import RouterState

MAX_FABRIC_BODY_BYTES = 1024 * 1024
_WORKERS = f"{FABRIC_PREFIX}/workers"
_OF_ONE_RUN = {
    "parameters": [
        {"name": "session_id", "in": "query", "required": True, "schema": {"type": "string", "maxLength": 100}}
    ]
}

log = get_logger(__name__)


def model_routes(state: RouterState) -> APIRouter:
    routes = APIRouter(tags=["models"], dependencies=[state.gate.allow(Access.CLIENT)])

    @routes.get(
        "/v1/models",
        summary="All models: served now, declared, or remembered for a day",
        responses=error_responses(401),
    )
    async def models() -> JSONResponse:
        return JSONResponse(model_list(state.link.directory, state.settings.on_no_worker))

    @routes.get("/v1/models/{model:path}", summary="One model", responses=error_responses(401, 404))
    async def model(model: str) -> JSONResponse:
        directory = state.link.directory
        if model not in directory.pools:
            directory = await state.link.fresh_directory()
        check_model(model, directory, "queue")
        return JSONResponse(model_object(model, directory.pools[model], state.settings.on_no_worker))

    return routes


def pool_routes(state: RouterState) -> APIRouter:
    routes = APIRouter(tags=["fabric"], dependencies=[state.gate.allow(Access.CLIENT_OR_MEMBER)])

    @routes.get(
        f"{FABRIC_PREFIX}/pools",
        summary="Queue depth, age, workers and slots of every model",
        responses=error_responses(401, 503),
    )
    async def pools() -> PoolList:
        return pool_list(state.link.directory, await state.link.ready_queue().stats.depths())

    @routes.get(
        f"{FABRIC_PREFIX}/pools/{{model:path}}",
        summary="The same of one model, for autoscalers",
        responses=error_responses(401, 404, 503),
    )
    async def pool(model: str) -> PoolDepth:
        depths = await state.link.ready_queue().stats.depths()
        known = {pool: lanes for pool, lanes in depths.items() if pool == model}
        if not known and model not in state.link.directory.pools:
            check_model(model, await state.link.fresh_directory(), "queue")
        return pool_of(model, state.link.directory, next(iter(known.values()), {}))

    return routes


def dead_letter_routes(state: RouterState) -> APIRouter:
    """Dead letters hold what users asked: they are for members of the fleet, not for every API key."""
    routes = APIRouter(tags=["dead letters"], dependencies=[state.gate.allow(Access.MEMBER)])
    one = f"{FABRIC_PREFIX}/dead"

    @routes.get(one, summary="Requests that were given up, oldest first", responses=error_responses(400, 401, 503))
    async def letters(
        after: str = Query("", max_length=60), limit: int = Query(100, ge=1, le=MAX_LETTERS)
    ) -> DeadLetterList:
        return await state.link.ready_queue().dead_letters.page(after, limit)

    @routes.get(
        one + "/{letter_id}",
        summary="One of them, with its request",
        responses=error_responses(400, 401, 404, 503),
    )
    async def letter(letter_id: str) -> DeadRequest:
        found = await state.link.ready_queue().dead_letters.request(letter_id)
        if found is None:
            raise PathNotFound(f"there is no dead letter {letter_id!r} any more")
        return found

    @routes.post(one + "/purge", summary="Remove some", responses=error_responses(400, 401, 413, 503))
    async def purge(letters: DeadLetterIds) -> Removed:
        return Removed(removed=await state.link.ready_queue().dead_letters.forget(letters.ids))

    return routes


def manager_routes(state: RouterState) -> APIRouter:
    """Paths that are the Manager's. The Router asks for the join token itself: its own address may be public where the
    Manager's is not, and a Manager that only this machine reaches may have no token to ask for."""
    routes = APIRouter(tags=["manager"], dependencies=[state.gate.allow(Access.MEMBER)])
    held = Held(lambda: state.lifecycle.shutting_down)
    state.metrics.registry.watch_gauge("inferq_session_connections", WORKERS_PRESENT, lambda: held.count)

    @routes.get(_WORKERS, summary="The fleet", response_model=WorkerList, responses=error_responses(401, 503))
    async def workers(request: Request) -> Response:
        return await _forward(state, request, _WORKERS)

    @routes.post(
        _WORKERS,
        summary="A worker joins",
        response_model=RegistrationAnswer,
        responses=error_responses(400, 401, 409, 413, 503),
        openapi_extra=_takes(Registration),
    )
    async def register(request: Request) -> Response:
        return await _forward(state, request, _WORKERS)

    @routes.post(
        _WORKERS + "/{worker_id}/heartbeat",
        summary="A worker reports",
        response_model=HeartbeatAnswer,
        responses=error_responses(400, 401, 410, 413, 503),
        openapi_extra=_takes(Heartbeat),
    )
    async def heartbeat(worker_id: str, request: Request) -> Response:
        return await _forward(state, request, f"{_WORKERS}/{check_worker_id(worker_id)}/heartbeat")

    @routes.post(
        _WORKERS + "/{worker_id}/drain",
        summary="A worker takes no more work, and ends",
        status_code=202,
        response_model=WorkerInfo,
        responses=error_responses(400, 401, 410, 503),
    )
    async def drain(worker_id: str, request: Request) -> Response:
        return await _forward(state, request, f"{_WORKERS}/{check_worker_id(worker_id)}/drain")

    @routes.get(
        _WORKERS + "/{worker_id}/session",
        summary="Held open by a worker session while it lives",
        response_class=Response,
        responses=error_responses(400, 401, 429, 503),
    )
    async def hold_session_connection(worker_id: str, session_id: str, request: Request) -> Response:
        token = request.headers.get(JOIN_TOKEN_HEADER, "")
        path = f"{_WORKERS}/{check_worker_id(worker_id)}/check"
        query = f"session_id={check_session_id(session_id)}"
        call, manager = FabricCall("POST", path, query, token, b"", request.state.request_id), _manager_of(state)
        return held.answer(lambda: _request_check(manager, call))

    @routes.post(
        _WORKERS + "/{worker_id}/check",
        summary="Its connection broke: is a worker dead?",
        status_code=202,
        response_class=Response,
        responses=error_responses(400, 401, 503),
        openapi_extra=_OF_ONE_RUN,
    )
    async def check(worker_id: str, request: Request) -> Response:
        return await _forward(state, request, f"{_WORKERS}/{check_worker_id(worker_id)}/check")

    @routes.delete(
        _WORKERS + "/{worker_id}",
        summary="A worker leaves",
        status_code=204,
        response_class=Response,
        responses=error_responses(400, 401, 410, 503),
        openapi_extra=_OF_ONE_RUN,
    )
    async def deregister(worker_id: str, request: Request) -> Response:
        return await _forward(state, request, f"{_WORKERS}/{check_worker_id(worker_id)}")

    @routes.get(
        f"{FABRIC_PREFIX}/broker",
        summary="Where the queue is",
        response_model=BrokerAddress,
        responses=error_responses(401, 503),
    )
    async def broker(request: Request) -> Response:
        return await _forward(state, request, f"{FABRIC_PREFIX}/broker")

    return routes


def _takes(message: type[BaseModel]) -> dict[str, Any]:
    """What the document says of a body that is passed on unread."""
    schema = message.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _request_check(manager: ManagerPort, call: FabricCall) -> None:
    """The connection of a worker that was held here broke: tell the Manager, which looks for itself."""
    try:
        await manager.forward(call)
    except ManagerUnavailable as error:
        log.info("check_not_requested", path=call.path, error=error.message, then="its heartbeats become overdue")


def _manager_of(state: RouterState) -> ManagerPort:
    if state.manager is None:
        why = "this router was started without --manager-url: ask the Manager itself"
        raise ManagerUnavailable(why, public=why)
    return state.manager


async def _forward(state: RouterState, request: Request, path: str) -> Response:
    """Pass on to the Manager what a member of the fleet asks."""
    token = request.headers.get(JOIN_TOKEN_HEADER, "")
    manager = _manager_of(state)
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FABRIC_BODY_BYTES:
                raise BodyTooLarge(
                    f"the body has more than {MAX_FABRIC_BODY_BYTES} bytes: no worker's message has so many"
                )
    except ClientDisconnect:
        raise BadRequest("the body broke off before its end") from None
    answer = await manager.forward(
        FabricCall(request.method, path, request.url.query, token, body, request.state.request_id)
    )
    if request.method != "GET" and not path.endswith("/heartbeat"):
        log.info("passed_on", method=request.method, path=path, status=answer.status)
    return Response(answer.body, answer.status, headers=dict(answer.headers))
