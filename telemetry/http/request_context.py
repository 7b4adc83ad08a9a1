"""What surrounds each request: its id in logs and answer, a limit on its body, a metric, an answer to any exception.

:class:`RequestContext` is the ASGI middleware of FastAPI apps; the Router's inference path calls
:func:`request_id_from` itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openai_api.errors import Dialect, dialect_of
from queue_schemas import BodyTooLarge, InferqError, UnsupportedEncoding
from queue_schemas.ids import random_hex

from ..logs import bind, get_logger
from ..metrics import Counts, MetricsRegistry
from .content_coding import decoded_body
from .error_answers import send_error

REQUEST_ID_HEADER = b"x-request-id"

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
Unbounded = Callable[[str, str], bool]
"""Whether requests with a method and path bound their bodies themselves."""
_RawHeaders = Iterable[tuple[bytes, bytes]]
log = get_logger(__name__)


def requests_counted(metrics: MetricsRegistry) -> Counts:
    """The count of all answers of a service, by role, path and status."""
    return metrics.counts("inferq_requests_total", "Answers by path and status", ("role", "path", "code"))


def new_request_id() -> str:
    """A fresh request id: ``req_`` and 32 hex digits."""
    return f"req_{random_hex()}"


def request_id_from(headers: _RawHeaders) -> str:
    """The caller's ``x-request-id`` if it is sane (1 to 128 letters, digits, ``_.:-``), else a fresh one."""
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            return value.decode("ascii") if _SANE_REQUEST_ID.fullmatch(value) else new_request_id()
    return new_request_id()


class RequestContext:
    """ASGI middleware: gives each request its id (``scope["state"]["request_id"]``, the logs, the answer), bounds its
    body, counts it, and answers an unforeseen exception with the error object instead of a closed connection."""

    def __init__(
        self, app: ASGIApp, metrics: MetricsRegistry, max_body_bytes: int, unbounded: Unbounded = lambda *_: False
    ) -> None:
        """``unbounded``: the requests whose bodies are bounded elsewhere."""
        self._app = app
        self._unbounded = unbounded
        self._max_body_bytes = max_body_bytes
        self._role = metrics.role
        self._requests = requests_counted(metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_from(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        bind(request_id=request_id)
        begun = perf_counter()
        dialect = dialect_of(scope["path"])
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id.encode())]
                if dialect is Dialect.ANTHROPIC:
                    message["headers"].append((b"request-id", request_id.encode()))
            await send(message)

        try:
            if not self._unbounded(scope["method"], scope["path"]):
                _check_length(scope["headers"], self._max_body_bytes)
                receive = _bounded(decoded_body(receive, scope["headers"]), self._max_body_bytes)
            else:
                receive = decoded_body(receive, scope["headers"])
            await self._app(scope, receive, send_with_id)
        except (BodyTooLarge, UnsupportedEncoding) as error:
            if status:
                raise  # the answer has begun: only closing the connection can tell the client
            await send_error(error, send_with_id, dialect, request_id)
        except Exception:
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            if status:
                raise  # the answer has begun: only closing the connection can tell the client
            answer = InferqError(f"something went wrong here; the log has it under {request_id}")
            await send_error(answer, send_with_id, dialect, request_id)
        finally:
            path = _path_label(scope)
            self._requests.add((self._role, path, str(status)))
            log.debug("request", method=scope["method"], path=path, status=status, seconds=perf_counter() - begun)


def _check_length(headers: _RawHeaders, limit: int) -> None:
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > limit):
            raise BodyTooLarge(f"the request's body of {value[:18].decode()} bytes is over the limit of {limit}")


def _bounded(receive: Receive, limit: int) -> Receive:
    """``receive`` that refuses to go on past ``limit`` bytes, for bodies that do not say their length."""
    received = 0

    @wraps(receive)  # so that code that drops the connection finds it below
    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise BodyTooLarge(f"the request's body is over the limit of {limit} bytes")
        return message

    return bounded


def _path_label(scope: Scope) -> str:
    """The route's template, not the path itself: a scanner must not be able to make a metric grow."""
    # Recent FastAPI keeps the path of an included router's route here, with the prefix; its own lacks it.
    route: Any = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return str(getattr(route, "path", "")) or "unknown"
