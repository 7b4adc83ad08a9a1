"""FastAPI apps of the fabric's services: :func:`prepare_app` gives each the same errors, limits, documents and health.

Serving an app on a port is in :mod:`telemetry.http.server`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, FastAPI, Response
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Scope

from queue_schemas.addresses import public_message

from ..metrics import MetricsRegistry, render_metrics
from .access import Access, allow, declared
from .browser_pages import add_browser_pages
from .error_answers import add_error_handlers
from .methods import DerivedMethods
from .openapi import FLEET, Describe, Document, add_security, complete_document, operations
from .request_context import RequestContext, Unbounded


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
    unbounded: Unbounded = lambda *_: False,
    unknown_path: str = "see /docs for what there is",
    describe: Describe | None = None,
) -> FastAPI:
    """Give ``app`` the request context, a limit on bodies, handlers that turn every error into the OpenAI error object,
    and an OpenAPI document that says so. ``unbounded``: requests that bound their bodies themselves.
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
    add_error_handlers(app)
    return app


def _refused(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorAnswer"}
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}


def _openapi(app: FastAPI, make: Callable[[], Document], describe: Describe | None) -> Document:
    """FastAPI's document, made whole once."""
    if app.openapi_schema is None:
        document = make()
        complete_document(document)
        accesses = {(route.method.lower(), route.path): route.access for route in declared(app)}
        for path, method, operation in operations(document):
            responses = operation["responses"]
            if "401" in responses:  # without credentials to ask for, LoopbackAccess decide
                responses["403"] = _refused(403)
            if method != "get" and accesses.get((method, path)) is Access.MEMBER:
                responses["415"] = _refused(415)
        (describe or _without_keys)(document)
        app.openapi_schema = document
    return app.openapi_schema


def _without_keys(document: Document) -> None:
    add_security(document, [("/drain", FLEET), ("/status", [*FLEET, {}])])


def health_routes(
    metrics: MetricsRegistry,
    reasons: Callable[[], Sequence[str]],
    before_scrape: Callable[[], Awaitable[None]] | None = None,
    warnings: Callable[[], Sequence[str]] = tuple,
    render: Callable[[], Awaitable[tuple[bytes, str]]] | None = None,
) -> APIRouter:
    """``/healthz``, ``/readyz`` and ``/metrics``.

    ``reasons`` says in sentences why the role is not ready (none: it is), ``warnings`` what an operator should look at
    though it is: they are in the answer, and take it out of no load balancer. Addresses in both are not shown.
    ``before_scrape`` brings figures up to date that are too dear to keep current all the time; it bounds its own time.
    ``render`` gives body and content type of ``/metrics`` for a role of several processes, instead of ``metrics``.
    """
    routes = APIRouter(tags=["health"], dependencies=[allow(Access.PUBLIC)])

    @routes.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @routes.get(
        "/readyz",
        summary="Whether the role can do its work, and if not, why",
        responses={503: {"description": "It cannot, for these reasons", "content": {"application/json": {}}}},
    )
    async def readyz() -> JSONResponse:
        why = [public_message(reason) for reason in reasons()]
        answer: dict[str, Any] = {"ready": not why, "reasons": why}
        if worrying := [public_message(warning) for warning in warnings()]:
            answer["warnings"] = worrying
        return JSONResponse(answer, 503 if why else 200)

    @routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def prometheus() -> Response:
        if before_scrape is not None:
            await before_scrape()
        body, content_type = await render() if render is not None else render_metrics(metrics)
        return Response(body, headers={"content-type": content_type})

    return routes


def health_app(title: str, metrics: MetricsRegistry, reasons: Callable[[], Sequence[str]]) -> FastAPI:
    """The app of a service that answers nothing but its health and metrics."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    prepare_app(app, metrics)
    app.include_router(health_routes(metrics, reasons))
    return app
