"""Serves ``POST`` on the inference paths as plain ASGI: the hot path, from the request's head to the end of its answer.

No web framework, no timer and no lock per request. The one task besides the request's own waits for the client to
leave.
"""

from __future__ import annotations

import asyncio
import re

from starlette.types import Receive, Scope, Send

from queue_schemas import BadRequest, BodyTooLarge, InferqError, RequestTimeout
from queue_schemas.headers import for_engine
from telemetry import get_logger, inject, span_for_request, tracing_enabled
from telemetry.http.access import Access
from telemetry.http.content_coding import decoded_body
from telemetry.http.request_context import REQUEST_ID_HEADER, new_request_id, request_id_from

from ..http.api_keys import ApiKeys
from ..http.bodies import ClientGone, read_body
from ..http.connection import Connection
from ..http.response_writer import ResponseWriter
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from .open_request import OpenRequest, request_timeout
from .open_requests import OpenRequests
from .service import InferenceRequest, InferenceService

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

log = get_logger(__name__)


class InferenceRoutes:
    """The inference paths of one Router."""

    access = Access.CLIENT
    """Who may call them: :meth:`serve` asks for the API key before anything is read."""

    def __init__(
        self,
        service: InferenceService,
        keys: ApiKeys,
        requests: OpenRequests,
        lifecycle: Lifecycle,
        metrics: RouterMetrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._keys = keys
        self._requests = requests
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

    async def _serve(self, scope: Scope, receive: Receive, send: Send, path: str, trace: str) -> int:
        headers = dict(scope["headers"])
        given_id = headers.get(REQUEST_ID_HEADER)
        request_id = new_request_id() if given_id is None else request_id_from(((REQUEST_ID_HEADER, given_id),))
        writer = ResponseWriter(send, request_id.encode(), path)
        connection = Connection(receive)
        request = OpenRequest(connection, self._loop().time())
        self._requests.add(request)
        try:
            self._lifecycle.ensure_accepting()
            tenant = self._keys.tenant(headers)
            self._service.admit(request, tenant, headers)
            received = InferenceRequest(
                path,
                await self._body(request, decoded_body(receive, scope["headers"])),
                _content_type(headers),
                headers,
                for_engine(scope["headers"]),
                request_id,
                trace or _traceparent(headers),
            )
            prepared = await self._service.prepare(received, tenant)
            if prepared.resumable:
                writer = self._service.resumable_writer(prepared, send, request_id.encode(), path)
            await self._service.answer(request, prepared, writer)
        except InferqError as error:
            connection.unwatch()
            log.debug("refused", request_id=request_id, code=error.code, message=error.message)
            unread = isinstance(error, (BodyTooLarge, RequestTimeout))
            await writer.fail(error, close=unread, mid_event=request.merger is not None and request.merger.mid_event)
        except ClientGone:
            self._metrics.disconnects.labels(request.disconnect_reason).inc()
        except Exception:
            connection.unwatch()
            log.exception("request_failed", request_id=request_id, path=path)
            await writer.fail(InferqError(f"something went wrong here; the log has it under {request_id}"))
        finally:
            connection.unwatch()
            self._service.leave(request, request_id)
        await connection.closed()
        self._metrics.answered(path, writer.status)
        return writer.status

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


def _traceparent(headers: dict[bytes, bytes]) -> str:
    """The client's trace; empty if it is not in the form of W3C Trace Context."""
    given = headers.get(b"traceparent", b"")
    return given.decode() if _TRACEPARENT.fullmatch(given) else ""


def _content_type(headers: dict[bytes, bytes]) -> str:
    """The content type, fit for a header again: a tab may stand wherever a space may."""
    given = headers.get(b"content-type", b"application/json").replace(b"\t", b" ")
    if not (given.isascii() and given.decode("latin-1").isprintable()):
        raise BadRequest("the content-type header has characters that no content type has; send application/json")
    return given.decode()
