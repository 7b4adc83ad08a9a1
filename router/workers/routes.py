"""The routes of ``/worker/v1``: messages in JSON or msgpack, as the worker asks."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from queue_schemas import BadRequest, BodyTooLarge, Heartbeat, HeartbeatAnswer, OverCapacity, SessionId
from queue_schemas.worker_protocol.encoding import JSON, MSGPACK, decode, encode, media_type_of
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from queue_schemas.worker_protocol.messages import (
    ClaimAnswer,
    ClaimCall,
    Decline,
    Join,
    Joined,
    JoinShard,
    LeaseCall,
    Reconcile,
    Reconciled,
    ServedElsewhere,
)
from queue_schemas.worker_protocol.output import Answers, OutputCall, ReleaseCall, SettleCall
from telemetry.http.access import Access, allow
from telemetry.http.error_answers import error_responses
from telemetry.http.fabric_calls import Forwarded

from .credentials import WorkerCredentials
from .rules import WorkerScope
from .service import WorkerService

MAX_CALL_BYTES = 16 << 20
"""Of one call: larger answers are sent in pieces."""
MAX_OPEN_BYTES = 256 << 20
"""Of all calls that are being read."""
_SESSION = WORKER_PREFIX + "/sessions/{session_id}"

_M = TypeVar("_M", bound=BaseModel)


class _OpenBytes:
    """Counts the bytes of bodies that are being read, for all calls together."""

    def __init__(self) -> None:
        self._used = 0

    async def read(self, request: Request) -> bytes:
        """The body. Raises ``BodyTooLarge``, ``OverCapacity`` and, for one that is cut short, ``BadRequest``."""
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in request.stream():
                size += len(piece)
                self._used += len(piece)
                if size > MAX_CALL_BYTES:
                    raise BodyTooLarge(f"one call has at most {MAX_CALL_BYTES} bytes: send a large answer in pieces")
                if self._used > MAX_OPEN_BYTES:
                    raise OverCapacity("this router reads too many calls of workers now: try again", retry_after_s=1)
                pieces.append(piece)
        except ClientDisconnect:
            raise BadRequest("the body was cut short: send it again") from None
        finally:
            self._used -= size
        return b"".join(pieces)


class _Door:
    """Admits the calls of workers and reads their messages."""

    def __init__(self, service: WorkerService, credentials: WorkerCredentials) -> None:
        self._service = service
        self._credentials = credentials
        self._open_bytes = _OpenBytes()

    def scope(self, request: Request) -> WorkerScope:
        """What the caller may do."""
        return self._credentials.scope(request)

    def admit(self, request: Request, session_id: str) -> tuple[WorkerScope, SessionId]:
        """The same, and its session."""
        scope = self._credentials.scope(request)
        return scope, self._service.admit(scope, session_id)

    async def read(self, request: Request, kind: type[_M]) -> _M:
        """The message of a call."""
        media_type = media_type_of(request.headers.get("content-type", ""))
        return decode(await self._open_bytes.read(request), media_type, kind)

    async def read_admitted(self, request: Request, session_id: str, kind: type[_M]) -> tuple[SessionId, _M]:
        """The message of a session's call."""
        _, session = self.admit(request, session_id)
        return session, await self.read(request, kind)


def worker_routes(service: WorkerService, credentials: WorkerCredentials) -> APIRouter:
    """The paths of workers over HTTP."""

    def check(request: Request) -> None:
        credentials.scope(request)

    routes = APIRouter(tags=["workers over HTTP"], dependencies=[allow(Access.WORKER, check)])
    door = _Door(service, credentials)
    _add_session_routes(routes, service, door)
    _add_attempt_routes(routes, service, door)
    return routes


def _add_session_routes(routes: APIRouter, service: WorkerService, door: _Door) -> None:
    """Joining, claiming, renewing, leaving."""

    @routes.post(
        WORKER_PREFIX + "/sessions",
        summary="A worker joins",
        **_declared(Join, Joined, 400, 401, 403, 409, 413, 415, 429, 503),
    )
    async def join(request: Request) -> Response:
        scope = door.scope(request)
        message = await door.read(request, Join)
        answer = await service.join(scope, message, request.state.request_id)
        return _forwarded(answer) if isinstance(answer, Forwarded) else _answer(request, answer)

    @routes.post(
        _SESSION + "/join", summary="Join a shard that did not answer", **_declared(JoinShard, None, *_STATUSES)
    )
    async def join_shard(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, JoinShard)
        await service.join_shard(session, message.shard)
        return Response(status_code=204)

    @routes.post(
        _SESSION + "/renew",
        summary="Keep the session's leases",
        **_declared(None, None, 400, 401, 403, 409, 429, 503),
    )
    async def renew(session_id: str, request: Request) -> Response:
        _, session = door.admit(request, session_id)
        await service.renew(session)
        return Response(status_code=204)

    @routes.post(
        _SESSION + "/heartbeat",
        summary="Keep the session's leases, and tell how the worker is; answers its assignment",
        **_declared(Heartbeat, HeartbeatAnswer, *_STATUSES, 410),
    )
    async def heartbeat(session_id: str, request: Request) -> Response:
        scope, session = door.admit(request, session_id)
        message = await door.read(request, Heartbeat)
        return _forwarded(await service.heartbeat(scope, session, message, request.state.request_id))

    @routes.delete(_SESSION, summary="The session ends", **_declared(None, None, 400, 401, 403, 429, 503))
    async def leave(session_id: str, request: Request) -> Response:
        _, session = door.admit(request, session_id)
        await service.leave(session, request.state.request_id)
        return Response(status_code=204)

    @routes.post(
        _SESSION + "/claim",
        summary="Take jobs, and read what the queue has to say; held while there is nothing",
        **_declared(ClaimCall, ClaimAnswer, *_STATUSES),
    )
    async def claim(session_id: str, request: Request) -> Response:
        scope, session = door.admit(request, session_id)
        answer = await service.claim(scope, session, await door.read(request, ClaimCall))
        door.scope(request)  # it may have been revoked meanwhile
        return _answer(request, answer)

    @routes.get(
        _SESSION + "/elsewhere",
        summary="Whether another worker serves a model",
        **_declared(None, ServedElsewhere, 400, 401, 403, 429, 503),
    )
    async def elsewhere(session_id: str, model: str, request: Request) -> Response:
        scope, session = door.admit(request, session_id)
        scope.check_models([model])
        return _answer(request, {"served": await service.served_elsewhere(session, model)})


def _add_attempt_routes(routes: APIRouter, service: WorkerService, door: _Door) -> None:
    """What attempts put out, and how they end."""

    @routes.post(_SESSION + "/output", summary="Pieces of streams", **_declared(OutputCall, Answers, *_STATUSES))
    async def output(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, OutputCall)
        return _answer(request, {"answers": await service.output(session, message.attempts)})

    @routes.post(
        _SESSION + "/settle", summary="End attempts with their answers", **_declared(SettleCall, Answers, *_STATUSES)
    )
    async def settle(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, SettleCall)
        return _answer(request, {"answers": await service.settle(session, message.attempts)})

    @routes.post(_SESSION + "/release", summary="Have jobs run again", **_declared(ReleaseCall, Answers, *_STATUSES))
    async def release(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, ReleaseCall)
        return _answer(request, {"answers": await service.release(session, message.attempts)})

    @routes.post(
        _SESSION + "/reconcile",
        summary="Compare what the session runs with what the queue knows",
        **_declared(Reconcile, Reconciled, *_STATUSES),
    )
    async def reconcile(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, Reconcile)
        return _answer(request, {"lost": await service.reconcile(session, message)})

    @routes.post(_SESSION + "/decline", summary="An attempt does not yield", **_declared(Decline, None, *_STATUSES))
    async def decline(session_id: str, request: Request) -> Response:
        scope, session = door.admit(request, session_id)
        await service.decline(scope, session, await door.read(request, Decline))
        return Response(status_code=204)

    @routes.post(
        _SESSION + "/clear_suspicion",
        summary="A suspect has put out more than before its engine crashed",
        **_declared(LeaseCall, None, *_STATUSES),
    )
    async def clear_suspicion(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, LeaseCall)
        await service.clear_suspicion(session, message.lease)
        return Response(status_code=204)

    @routes.post(
        _SESSION + "/delivered",
        summary="What earlier attempts of a persisted stream said",
        **_declared(LeaseCall, None, *_STATUSES, status=200),
    )
    async def delivered(session_id: str, request: Request) -> Response:
        session, message = await door.read_admitted(request, session_id, LeaseCall)
        pieces = await service.delivered(session, message.lease)
        return StreamingResponse(pieces, media_type="application/octet-stream")


_STATUSES = (400, 401, 403, 409, 413, 415, 429, 503)


def _declared(
    body: type[BaseModel] | None, answer: type[BaseModel] | None, *errors: int, status: int = 0
) -> dict[str, Any]:
    """What the OpenAPI document says of a route."""
    declared: dict[str, Any] = {
        "responses": error_responses(*errors),
        "status_code": status or (200 if answer is not None else 204),
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
    accepted = request.headers.get("accept", "")
    media_type = MSGPACK if MSGPACK in accepted else JSON
    return Response(encode(message, media_type), media_type=media_type)


def _forwarded(answer: Forwarded) -> Response:
    return Response(answer.body, answer.status, headers=dict(answer.headers))
