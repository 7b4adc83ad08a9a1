"""Serves ``POST`` on the inference paths: the hot path, from the request's head to the end of its answer.

No web framework, no timer and no lock per request. A request that has arrived whole is served from callbacks, without a
task (:mod:`router.inference.direct`), as long as nothing must be waited for; all others, and those that meet anything
unusual, as plain ASGI.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from starlette.types import Receive, Scope, Send

from queue_schemas import BadRequest, Tenant
from queue_schemas.headers import for_engine
from telemetry import inject, span_for_request, tracing_enabled
from telemetry.http.access import Access
from telemetry.http.connections import RequestCycle
from telemetry.http.content_coding import decoded_body
from telemetry.http.request_context import REQUEST_ID_HEADER, new_request_id, request_id_from

from ..http.api_keys import ApiKeys
from ..http.bodies import ClientGone, read_body
from ..http.connection import Connection
from ..http.response_writer import ResponseWriter
from ..http.rules import check_size
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from .direct import DirectAnswer
from .exchange import Exchange
from .open_request import OpenRequest, request_timeout
from .open_requests import OpenRequests
from .relay import Relay
from .rules import TIER_HEADER
from .service import InferenceRequest, InferenceService

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class InferenceRoutes:
    """The inference paths of one Router."""

    access = Access.CLIENT
    """Who may call them: the API key is asked for before anything is read."""

    def __init__(
        self,
        service: InferenceService,
        keys: ApiKeys,
        requests: OpenRequests,
        relay: Relay,
        lifecycle: Lifecycle,
        metrics: RouterMetrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._keys = keys
        self._requests = requests
        self._relay = relay
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._loop = asyncio.get_running_loop

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Answer one request on ``path``, one of the allowlist."""
        if not tracing_enabled():
            await self._serve(scope, receive, send, path, "")
            return
        parent = _traceparent(dict(scope["headers"]))
        with span_for_request(f"POST {path}", parent) as span:
            status = await self._serve(scope, receive, send, path, inject(parent))
            span.set("http.response.status_code", status)
            if status >= 500:
                span.fail(str(status))

    def serve_directly(self, cycle: RequestCycle, path: str) -> bool:
        """Answer a request on ``path`` that has arrived whole without a task. False, without a trace, for one that is
        unusual, or refused: :meth:`serve` knows how, or says why."""
        raw_headers, body = cycle.scope["headers"], cycle.body
        headers = dict(raw_headers)
        if tracing_enabled() or not self._service.may_be_direct(path, headers):
            return False
        request = OpenRequest(Connection(cycle.receive, cycle), self._loop().time())
        self._requests.add(request)
        try:
            tenant = self._admit(request, headers)
            check_size(len(body), self._max_body_bytes)
            self._requests.take_body(request, len(body))
            request_id = _request_id(headers)
            received = _received(path, bytes(body), headers, raw_headers, request_id, "")
            prepared = self._service.prepare_now(received, tenant)
            is_direct = self._service.is_direct(prepared)
        except Exception:  # noqa: BLE001 - serve meets it again, and tells
            is_direct = False
        if not is_direct:
            self._requests.discard(request)
            return False
        cycle.drop_body()
        writer = ResponseWriter(cycle.send, request_id.encode(), path, cycle)
        if prepared.tier:
            writer.add_header(TIER_HEADER, prepared.tier.encode())
        exchange = Exchange(self._service, self._metrics, request, writer, path, request_id)
        DirectAnswer(cycle, exchange, self._relay).begin(self._service, prepared)
        return True

    async def _serve(self, scope: Scope, receive: Receive, send: Send, path: str, trace: str) -> int:
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        request = OpenRequest(Connection(receive), self._loop().time())
        self._requests.add(request)
        writer = ResponseWriter(send, request_id.encode(), path)
        exchange = Exchange(self._service, self._metrics, request, writer, path, request_id)
        return await exchange.run(self._answer(exchange, scope, receive, send, headers, trace))

    async def _answer(
        self,
        exchange: Exchange,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: dict[bytes, bytes],
        trace: str,
    ) -> None:
        request, path, request_id = exchange.request, exchange.path, exchange.request_id
        tenant = self._admit(request, headers)
        body = await self._body(request, decoded_body(receive, scope["headers"]))
        received = _received(path, body, headers, scope["headers"], request_id, trace)
        prepared = await self._service.prepare(received, tenant)
        if prepared.resumable:
            exchange.writer = self._service.resumable_writer(prepared, send, request_id.encode(), path)
        if prepared.tier:
            exchange.writer.add_header(TIER_HEADER, prepared.tier.encode())
        await self._service.answer(request, prepared, exchange.writer)

    def _admit(self, request: OpenRequest, headers: dict[bytes, bytes]) -> Tenant:
        self._lifecycle.ensure_accepting()
        tenant = self._keys.tenant(headers)
        self._service.admit(request, tenant, headers)
        return tenant

    async def _body(self, request: OpenRequest, receive: Receive) -> bytes:
        # No limit in time: the connection ends a body that is silent or slow.
        request.allow_interrupt(float("inf"), request_timeout)
        try:
            return await read_body(receive, self._max_body_bytes, lambda size: self._requests.take_body(request, size))
        except asyncio.CancelledError:
            if not request.absorb_interrupt():
                raise
            raise request.error or ClientGone from None
        finally:
            request.forbid_interrupt()


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(REQUEST_ID_HEADER)
    return new_request_id() if given is None else request_id_from(((REQUEST_ID_HEADER, given),))


def _received(
    path: str,
    body: bytes,
    headers: dict[bytes, bytes],
    raw_headers: Iterable[tuple[bytes, bytes]],
    request_id: str,
    trace: str,
) -> InferenceRequest:
    return InferenceRequest(
        path,
        body,
        _content_type(headers),
        headers,
        for_engine(raw_headers),
        request_id,
        trace or _traceparent(headers),
    )


def _traceparent(headers: dict[bytes, bytes]) -> str:
    """The client's trace; empty if it is not in the form of W3C Trace Context."""
    given = headers.get(b"traceparent")
    return given.decode() if given is not None and _TRACEPARENT.fullmatch(given) else ""


def _content_type(headers: dict[bytes, bytes]) -> str:
    """The content type, fit for a header again: a tab may stand wherever a space may."""
    given = headers.get(b"content-type", b"application/json")
    if given == b"application/json":
        return "application/json"
    given = given.replace(b"\t", b" ")
    if not (given.isascii() and given.decode("latin-1").isprintable()):
        raise BadRequest("the content-type header has characters that no content type has; send application/json")
    return given.decode()
