"""What every HTTP service of the fabric has in common: request ids, the error object, health pages.

For FastAPI apps: :func:`prepare_app` installs all of it. The Router's bare-ASGI hot path takes the same pieces one by
one (:func:`request_id_from`, :func:`error_answer`). Serving an app on a port is in :mod:`telemetry.http.server`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial, wraps
from http import HTTPStatus
from time import perf_counter
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openai_api.errors import Dialect, dialect_of, error_body, facts_of, is_final
from queue_schemas import (
    BadRequest,
    BodyTooLarge,
    InferqError,
    MethodNotAllowed,
    PathNotFound,
    UnsupportedEncoding,
)
from queue_schemas.addresses import for_strangers

from ..logs import bind, get_logger
from ..metrics import MetricsRegistry, render_metrics
from .access import Access, allow, declared
from .browser_pages import add_browser_pages
from .content_coding import ACCEPT_ENCODING, decoded_body
from .methods import DerivedMethods, allow_header, answered_methods
from .openapi import FLEET, Describe, Document, complete, operations, secure

REQUEST_ID_HEADER = b"x-request-id"
DEFAULT_RETRY_AFTER_S = 1

_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_RawHeaders = Iterable[tuple[bytes, bytes]]
log = get_logger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words: all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every answer from status 400 up."""

    error: ErrorDetail


def new_request_id() -> str:
    """A fresh request id: ``req_`` and 32 hex digits."""
    return f"req_{secrets.token_hex(16)}"


def request_id_from(headers: _RawHeaders) -> str:
    """The caller's ``x-request-id`` if it is sane (1 to 128 letters, digits, ``_.:-``), else a fresh one."""
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            return value.decode("ascii") if _SANE_REQUEST_ID.fullmatch(value) else new_request_id()
    return new_request_id()


def error_answer(
    error: InferqError, dialect: Dialect = Dialect.OPENAI, request_id: str = ""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, raw headers and body of the answer that tells a client of ``error``, as the ``dialect`` tells it."""
    body = error_body(facts_of(error), dialect, request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (429, 503):
        after = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", str(after).encode()))
    if is_final(error):
        headers.append((b"x-should-retry", b"false"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 415:
        headers.append((b"accept-encoding", ACCEPT_ENCODING))
    return error.status, headers, body


def error_response(error: InferqError, request: Request | None = None) -> Response:
    """:func:`error_answer` for a FastAPI handler; ``request`` says in which API's shape."""
    dialect = dialect_of(request.url.path) if request is not None else Dialect.OPENAI
    request_id = getattr(request.state, "request_id", "") if request is not None else ""
    status, headers, body = error_answer(error, dialect, request_id)
    response = Response(body, status)
    response.raw_headers = list(headers)
    return response


class RequestContext:
    """ASGI middleware: gives each request its id (``scope["state"]["request_id"]``, the logs, the answer), bounds its
    body, counts it, and answers an unforeseen exception with the error object instead of a closed connection."""

    def __init__(
        self, app: ASGIApp, metrics: MetricsRegistry, max_body_bytes: int, unbounded: Collection[tuple[str, str]] = ()
    ) -> None:
        self._app = app
        self._unbounded = frozenset(unbounded)
        self._max_body_bytes = max_body_bytes
        self._role = metrics.role
        self._requests = metrics.counter(
            "inferq_requests_total", "Answers by path and status", ("role", "path", "code")
        )

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
            if (scope["method"], scope["path"]) not in self._unbounded:
                _check_length(scope["headers"], self._max_body_bytes)
                receive = _bounded(decoded_body(receive, scope["headers"]), self._max_body_bytes)
            else:
                receive = decoded_body(receive, scope["headers"])
            await self._app(scope, receive, send_with_id)
        except (BodyTooLarge, UnsupportedEncoding) as error:
            if status:
                raise  # the answer has begun: only closing the connection can tell the client
            await _send_error(error, send_with_id, dialect, request_id)
        except Exception:
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            if status:
                raise  # the answer has begun: only closing the connection can tell the client
            answer = InferqError(f"something went wrong here; the log has it under {request_id}")
            await _send_error(answer, send_with_id, dialect, request_id)
        finally:
            path = _path_label(scope)
            self._requests.labels(self._role, path, str(status)).inc()
            log.debug("request", method=scope["method"], path=path, status=status, seconds=perf_counter() - begun)


async def call_app(
    app: ASGIApp, method: str, path: str, query: str, headers: Sequence[tuple[str, str]], body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Call ``app`` without a socket; status, headers and body of its answer. Names of headers are lower case."""
    raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "root_path": "",
        "query_string": query.encode("latin-1"),
        "headers": [*raw_headers, (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    request: list[Message] = [{"type": "http.request", "body": body}]
    status, answered, parts = 500, list[tuple[str, str]](), list[bytes]()

    async def receive() -> Message:
        return request.pop() if request else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, answered
        if message["type"] == "http.response.start":
            status = message["status"]
            answered = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, answered, b"".join(parts)


def prepare_app(
    app: FastAPI,
    metrics: MetricsRegistry,
    *,
    max_body_bytes: int = 1024 * 1024,
    unbounded: Collection[tuple[str, str]] = (),
    unknown_path: str = "see /docs for what there is",
    describe: Describe | None = None,
) -> FastAPI:
    """Give ``app`` the request context, a limit on bodies, handlers that turn every error into the OpenAI error object,
    and an OpenAPI document that says so. ``unbounded``: methods and paths that bound their bodies themselves.
    ``unknown_path`` ends the sentence that answers any other path. ``describe`` says in the document who may ask
    what."""
    # A redirect would name the scheme and host of the request as the app sees them: behind a proxy that ends TLS it
    # would lead a client, with its key, to plain HTTP.
    app.router.redirect_slashes = False
    add_browser_pages(app)
    app.state.unknown_path = unknown_path
    app.add_middleware(DerivedMethods)
    app.add_middleware(RequestContext, metrics=metrics, max_body_bytes=max_body_bytes, unbounded=unbounded)
    app.openapi = partial(_openapi, app, app.openapi, describe)  # type: ignore[method-assign]  # as FastAPI documents it
    app.add_exception_handler(InferqError, _on_inferq_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a FastAPI route that may answer with the error object."""
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def _refused(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorAnswer"}
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}


def _openapi(app: FastAPI, make: Callable[[], Document], describe: Describe | None) -> Document:
    """FastAPI's document, made whole once."""
    if app.openapi_schema is None:
        document = make()
        complete(document)
        accesses = {(route.method.lower(), route.path): route.access for route in declared(app)}
        for path, method, operation in operations(document):
            responses = operation["responses"]
            if "401" in responses:  # without credentials to ask for, LocalCallers decide
                responses["403"] = _refused(403)
            if method != "get" and accesses.get((method, path)) is Access.MEMBER:
                responses["415"] = _refused(415)
        (describe or _without_keys)(document)
        app.openapi_schema = document
    return app.openapi_schema


def _without_keys(document: Document) -> None:
    secure(document, [("/drain", FLEET), ("/status", [*FLEET, {}])])


def health_routes(
    metrics: MetricsRegistry,
    reasons: Callable[[], Sequence[str]],
    before_scrape: Callable[[], Awaitable[None]] | None = None,
    warnings: Callable[[], Sequence[str]] = tuple,
) -> APIRouter:
    """``/healthz``, ``/readyz`` and ``/metrics``.

    ``reasons`` says in sentences why the role is not ready (none: it is), ``warnings`` what an operator should look at
    though it is: they are in the answer, and take it out of no load balancer. Addresses in both are not shown.
    ``before_scrape`` brings figures up to date that are too dear to keep current all the time; it bounds its own time.
    """
    routes = APIRouter(tags=["health"], dependencies=[allow(Access.PUBLIC)])

    @routes.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @routes.get("/readyz", summary="Whether the role can do its work, and if not, why (503)")
    async def readyz() -> JSONResponse:
        why = [for_strangers(reason) for reason in reasons()]
        told: dict[str, Any] = {"ready": not why, "reasons": why}
        if worrying := [for_strangers(warning) for warning in warnings()]:
            told["warnings"] = worrying
        return JSONResponse(told, 503 if why else 200)

    @routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def prometheus() -> Response:
        if before_scrape is not None:
            await before_scrape()
        body, content_type = render_metrics(metrics)
        return Response(body, headers={"content-type": content_type})

    return routes


def health_app(title: str, metrics: MetricsRegistry, reasons: Callable[[], Sequence[str]]) -> FastAPI:
    """The app of a service that answers nothing but its health and metrics."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    prepare_app(app, metrics)
    app.include_router(health_routes(metrics, reasons))
    return app


def _check_length(headers: _RawHeaders, limit: int) -> None:
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > limit):
            raise BodyTooLarge(f"the request's body of {value[:18].decode()} bytes is over the limit of {limit}")


def _bounded(receive: Receive, limit: int) -> Receive:
    """``receive`` that refuses to go on past ``limit`` bytes, for bodies that do not say their length."""
    received = 0

    @wraps(receive)  # whoever has to drop the connection finds it below
    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise BodyTooLarge(f"the request's body is over the limit of {limit} bytes")
        return message

    return bounded


async def _send_error(error: InferqError, send: Send, dialect: Dialect, request_id: str) -> None:
    status, headers, body = error_answer(error, dialect, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _path_label(scope: Scope) -> str:
    """The route's template, not the path itself: a scanner must not be able to make a metric grow."""
    # Recent FastAPI keeps the path of an included router's route here, with the prefix; its own lacks it.
    route: Any = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return str(getattr(route, "path", "")) or "unknown"


async def _on_inferq_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InferqError)  # noqa: S101 - what the handler is registered for
    return error_response(error, request)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    param = ".".join(where[1:]) or None
    return error_response(
        BadRequest(f"{' '.join(where[:1])} {param or ''}: {first['msg']}".strip(), param=param), request
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    method, path = request.method, request.url.path
    if isinstance(error.__cause__, InferqError):
        return error_response(
            error.__cause__, request
        )  # raised while the body was read, which FastAPI takes for its own
    if error.status_code == 404:
        return error_response(PathNotFound(f"there is no {path} here; {request.app.state.unknown_path}"), request)
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{path} does not answer {method}"), request)
        response.headers["allow"] = allow_header(answered_methods(request.app, path))
        return response
    if error.status_code < 500:
        refused = BadRequest(str(error.detail))
        response = error_response(refused, request)
        response.status_code = error.status_code
        return response
    return error_response(InferqError(str(error.detail)), request)
