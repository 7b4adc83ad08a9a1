"""The paths of ``/worker/v1``: as FastAPI's routes, with their documents, and a short way for a session's calls."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from openai_api.errors import Dialect
from queue_schemas import InferqError
from queue_schemas.worker_protocol.encoding import JSON, MSGPACK, decode, encode, media_type_of
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from queue_schemas.worker_protocol.messages import Join, Joined, LeaseCall, ServedElsewhere
from telemetry import MetricsRegistry, get_logger
from telemetry.http.access import Access, allow
from telemetry.http.content_coding import decoded_body
from telemetry.http.error_answers import error_responses, send_error
from telemetry.http.fabric_calls import Forwarded
from telemetry.http.request_context import REQUEST_ID_HEADER, request_id_from, requests_counted

from .calls import SESSION_CALLS, SessionCall, WorkerCalls
from .credentials import WorkerCredentials
from .service import WorkerService

_SESSIONS = WORKER_PREFIX + "/sessions"
_SESSION = _SESSIONS + "/{session_id}"
_PREFIX = _SESSIONS + "/"

_M = TypeVar("_M", bound=BaseModel)

log = get_logger(__name__)


class WorkerEntry:
    """Answers a session's calls as ASGI, past FastAPI: a worker sends one with each step of its engine."""

    def __init__(self, calls: WorkerCalls, metrics: MetricsRegistry) -> None:
        self._calls = calls
        self._role = metrics.role
        self._requests = requests_counted(metrics)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request. False, and nothing done, for one that is no session's call."""
        path: str = scope["path"]
        if scope["method"] != "POST" or not path.startswith(_PREFIX):
            return False
        session_id, _, name = path[len(_PREFIX) :].partition("/")
        call = SESSION_CALLS.get(name)
        if call is None:
            return False
        request_id = request_id_from(scope["headers"])
        status = await self._answer(call, session_id, scope, receive, send, request_id)
        self._requests.add((self._role, f"{_SESSION}/{name}", str(status)))
        return True

    async def _answer(
        self, call: SessionCall, session_id: str, scope: Scope, receive: Receive, send: Send, request_id: str
    ) -> int:
        raw_headers = scope["headers"]
        try:
            answer = await self._calls.answer(
                call, session_id, dict(raw_headers), decoded_body(receive, raw_headers), request_id
            )
        except InferqError as error:
            await _send_error(error, send, request_id)
            return error.status
        except Exception:
            log.exception("request_failed", method="POST", path=scope["path"])
            await _send_error(
                InferqError(f"something went wrong here; the log has it under {request_id}"), send, request_id
            )
            return 500
        headers = [(b"content-length", b"%d" % len(answer.body)), (REQUEST_ID_HEADER, request_id.encode())]
        if answer.body:
            headers.append((b"content-type", answer.media_type.encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return answer.status


async def _send_error(error: InferqError, send: Send, request_id: str) -> None:
    async def send_with_id(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]
        await send(message)

    await send_error(error, send_with_id, Dialect.OPENAI, request_id)


def worker_routes(service: WorkerService, credentials: WorkerCredentials, calls: WorkerCalls) -> APIRouter:
    """The paths of workers over HTTP."""

    def check(request: Request) -> None:
        credentials.scope(dict(request.scope["headers"]))

    routes = APIRouter(tags=["workers over HTTP"], dependencies=[allow(Access.WORKER, check)])

    async def read(request: Request, kind: type[_M]) -> _M:
        media_type = media_type_of(request.headers.get("content-type", ""))
        with calls.opened() as take:
            return decode(await calls.read(request.receive, take), media_type, kind)

    @routes.post(_SESSIONS, summary="A worker joins", **_declared(Join, Joined, 400, 401, 403, 409, 413, 415, 429, 503))
    async def join(request: Request) -> Response:
        scope = credentials.scope(dict(request.scope["headers"]))
        answer = await service.join(scope, await read(request, Join), request.state.request_id)
        if isinstance(answer, Forwarded):
            return Response(answer.body, answer.status, headers=dict(answer.headers))
        return _answer(request, answer)

    @routes.delete(_SESSION, summary="The session ends", **_declared(None, None, 400, 401, 403, 429, 503))
    async def leave(session_id: str, request: Request) -> Response:
        session = service.admit(credentials.scope(dict(request.scope["headers"])), session_id)
        await service.leave(session, request.state.request_id)
        return Response(status_code=204)

    @routes.get(
        _SESSION + "/elsewhere",
        summary="Whether another worker serves a model",
        **_declared(None, ServedElsewhere, 400, 401, 403, 429, 503),
    )
    async def elsewhere(session_id: str, model: str, request: Request) -> Response:
        scope = credentials.scope(dict(request.scope["headers"]))
        session = service.admit(scope, session_id)
        scope.check_models([model])
        return _answer(request, {"served": await service.served_elsewhere(session, model)})

    @routes.post(
        _SESSION + "/delivered",
        summary="What earlier attempts of a persisted stream said",
        **_declared(LeaseCall, None, 400, 401, 403, 413, 415, 429, 503) | {"status_code": 200},
    )
    async def delivered(session_id: str, request: Request) -> Response:
        session = service.admit(credentials.scope(dict(request.scope["headers"])), session_id)
        pieces = await service.delivered(session, (await read(request, LeaseCall)).lease)
        return StreamingResponse(pieces, media_type="application/octet-stream")

    for name, call in SESSION_CALLS.items():
        _add(routes, f"{_SESSION}/{name}", call, calls)
    return routes


def _add(routes: APIRouter, path: str, call: SessionCall, calls: WorkerCalls) -> None:
    """A session's call as a route."""

    @routes.post(path, summary=call.summary, **_declared(call.message, call.answer, *call.errors))
    async def answer(session_id: str, request: Request) -> Response:
        headers = dict(request.scope["headers"])
        found = await calls.answer(call, session_id, headers, request.receive, request.state.request_id)
        return Response(found.body or None, found.status, media_type=found.media_type or None)


def _declared(body: type[BaseModel] | None, answer: type[BaseModel] | None, *errors: int) -> dict[str, Any]:
    """What the OpenAPI document says of a route."""
    declared: dict[str, Any] = {
        "responses": error_responses(*errors),
        "status_code": 200 if answer is not None else 204,
        "response_class": Response,
    }
    if answer is not None:
        schema = {"schema": answer.model_json_schema()}
        declared["responses"] |= {200: {"description": "OK", "content": {JSON: schema, MSGPACK: schema}}}
    if body is not None:
        schema = {"schema": body.model_json_schema()}
        declared["openapi_extra"] = {"requestBody": {"required": True, "content": {JSON: schema, MSGPACK: schema}}}
    return declared


def _answer(request: Request, message: dict[str, Any]) -> Response:
    media_type = MSGPACK if MSGPACK in request.headers.get("accept", "") else JSON
    return Response(encode(message, media_type), media_type=media_type)
