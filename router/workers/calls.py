"""The calls of a worker session: what each takes, answers and does, and how it is read and answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.types import Receive

from queue_schemas import BadRequest, Heartbeat, HeartbeatAnswer, OverCapacity, SessionId
from queue_schemas.worker_protocol.encoding import JSON, MSGPACK, decode, encode, media_type_of
from queue_schemas.worker_protocol.messages import (
    ClaimAnswer,
    ClaimCall,
    Decline,
    LeaseCall,
    Reconcile,
    Reconciled,
)
from queue_schemas.worker_protocol.output import Answers, OutputCall, ReleaseCall, SettleCall
from telemetry.http.fabric_calls import Forwarded

from ..http.bodies import ClientGone, read_body
from .credentials import WorkerCredentials
from .rules import WorkerScope
from .service import WorkerService

MAX_CALL_BYTES = 16 << 20
"""Of one call: larger answers are sent in pieces."""
MAX_OPEN_BYTES = 256 << 20
"""Of all calls that are being read or answered."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a session, with what its credential allows."""

    service: WorkerService
    scope: WorkerScope
    session_id: SessionId
    request_id: str


@dataclass(frozen=True, slots=True)
class SessionCall:
    """``POST /worker/v1/sessions/{session_id}/NAME``. ``message`` and ``answer``: None for none."""

    summary: str
    message: type[BaseModel] | None
    answer: type[BaseModel] | None
    run: Callable[[Caller, Any], Awaitable[dict[str, Any] | Forwarded | None]]
    errors: tuple[int, ...] = (400, 401, 403, 409, 413, 415, 429, 503)
    has_output: bool = False
    """Whether it carries output, which takes memory until the queue has it."""


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """The answer to a call; ``body`` is empty for one without content."""

    status: int
    media_type: str
    body: bytes


class WorkerCalls:
    """Reads, checks and answers the calls of :data:`SESSION_CALLS`, however they have come in."""

    def __init__(self, service: WorkerService, credentials: WorkerCredentials) -> None:
        self._service = service
        self._credentials = credentials
        self._open_bytes = 0

    async def answer(
        self,
        call: SessionCall,
        session_id: str,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        request_id: str,
    ) -> CallAnswer:
        """The answer. Raises the errors that the call is refused with."""
        scope = self._credentials.scope(headers)
        caller = Caller(self._service, scope, self._service.admit(scope, session_id), request_id)
        message = None
        with self.opened() as take:
            if call.message is not None:
                media_type = media_type_of(headers.get(b"content-type", b"").decode("latin-1"))
                message = decode(await self.read(receive, take), media_type, call.message)
                if not call.has_output:
                    take(0)
            found = await call.run(caller, message)
        self._credentials.scope(headers)  # it may have been revoked while the call was held
        if found is None:
            return CallAnswer(204, "", b"")
        if isinstance(found, Forwarded):
            return CallAnswer(found.status, JSON, found.body)
        media_type = MSGPACK if MSGPACK.encode() in headers.get(b"accept", b"") else JSON
        return CallAnswer(200, media_type, encode(found, media_type))

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], None]]:
        """Counts a call as open while it has bytes: what is given is called with how many, and may raise
        ``OverCapacity``."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._open_bytes += size - taken
            taken = size
            if self._open_bytes > MAX_OPEN_BYTES:
                raise OverCapacity("this router reads too many calls of workers now: try again", retry_after_s=1)

        try:
            yield take
        finally:
            self._open_bytes -= taken

    async def read(self, receive: Receive, take: Callable[[int], None]) -> bytes:
        """The body of a call, counted by ``take``. Raises ``BodyTooLarge``, what ``take`` raises and, if it is cut
        short, ``BadRequest``."""
        try:
            return await read_body(receive, MAX_CALL_BYTES, take)
        except ClientGone:
            raise BadRequest("the body was cut short: send it again") from None


async def _renew(caller: Caller, _: None) -> None:
    await caller.service.renew(caller.session_id)


async def _heartbeat(caller: Caller, message: Heartbeat) -> Forwarded:
    return await caller.service.heartbeat(caller.scope, caller.session_id, message, caller.request_id)


async def _claim(caller: Caller, message: ClaimCall) -> dict[str, Any]:
    return await caller.service.claim(caller.scope, caller.session_id, message)


async def _output(caller: Caller, message: OutputCall) -> dict[str, Any]:
    return {"answers": await caller.service.output(caller.session_id, message.attempts)}


async def _settle(caller: Caller, message: SettleCall) -> dict[str, Any]:
    return {"answers": await caller.service.settle(caller.session_id, message.attempts)}


async def _release(caller: Caller, message: ReleaseCall) -> dict[str, Any]:
    return {"answers": await caller.service.release(caller.session_id, message.attempts)}


async def _reconcile(caller: Caller, message: Reconcile) -> dict[str, Any]:
    return {"lost": await caller.service.reconcile(caller.session_id, message)}


async def _decline(caller: Caller, message: Decline) -> None:
    await caller.service.decline(caller.scope, caller.session_id, message)


async def _clear_suspicion(caller: Caller, message: LeaseCall) -> None:
    await caller.service.clear_suspicion(caller.session_id, message.lease)


SESSION_CALLS: Mapping[str, SessionCall] = {
    "renew": SessionCall("Keep the session's leases", None, None, _renew, (400, 401, 403, 409, 429, 503)),
    "heartbeat": SessionCall(
        "Keep the session's leases, and tell how the worker is; answers its assignment",
        Heartbeat,
        HeartbeatAnswer,
        _heartbeat,
        (400, 401, 403, 409, 410, 413, 415, 429, 503),
    ),
    "claim": SessionCall(
        "Take jobs, and read what the queue has to say; held while there is nothing", ClaimCall, ClaimAnswer, _claim
    ),
    "output": SessionCall("Pieces of streams", OutputCall, Answers, _output, has_output=True),
    "settle": SessionCall("End attempts with their answers", SettleCall, Answers, _settle, has_output=True),
    "release": SessionCall("Have jobs run again", ReleaseCall, Answers, _release, has_output=True),
    "reconcile": SessionCall(
        "Compare what the session runs with what the queue knows", Reconcile, Reconciled, _reconcile
    ),
    "decline": SessionCall("An attempt does not yield", Decline, None, _decline),
    "clear_suspicion": SessionCall(
        "A suspect has put out more than before its engine crashed", LeaseCall, None, _clear_suspicion
    ),
}
"""By name."""
