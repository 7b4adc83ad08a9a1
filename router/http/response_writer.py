"""One answer on its way to the client: what has begun cannot begin again, and an error takes the form that fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from starlette.types import Send

from openai_api.engine_errors import facts_of_refusal, shaped_refusal
from openai_api.errors import Dialect, dialect_of, error_event, facts_of, keepalive
from openai_api.event_normalizer import EventNormalizer
from openai_api.sse import EVENT_STREAM, encode_event, has_event_field
from queue_schemas import InferqError
from telemetry.http.connections import RequestCycle, header_line
from telemetry.http.error_answers import error_answer

from .response_head import ResponseHead

Header = tuple[bytes, bytes]

QUEUED = "queued"
_JSON = "application/json"
_KEEPALIVE_HEAD = ResponseHead(200, f"{EVENT_STREAM}; charset=utf-8")
_EVENT_STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_EVENT_STREAM_LINES = b"".join(header_line(name, value) for name, value in _EVENT_STREAM_HEADERS)
_CLOSE = (b"connection", b"close")


class ResponseWriter:
    """Sends one answer. ``status`` is 0 until it has begun. Every answer carries ``x-request-id``.

    ``path`` is that of the API whose clients read the response: errors and keep-alives have that API's form. Where our
    own server's ``cycle`` is given, :meth:`write_now` and its like write without waiting for the client to read."""

    __slots__ = ("_client_events", "_cycle", "_dialect", "_events", "_ids", "_more", "_request_id", "_send", "status")

    def __init__(self, send: Send, request_id: bytes, path: str = "", cycle: RequestCycle | None = None) -> None:
        self._send = send
        self._cycle = cycle
        self._dialect = dialect_of(path)
        self._request_id = request_id.decode("latin-1")
        self._ids: tuple[Header, ...] = ((b"x-request-id", request_id),)
        if self._dialect is Dialect.ANTHROPIC:
            self._ids += ((b"request-id", request_id),)
        self._client_events = EventNormalizer(self._dialect, self._request_id)
        self._more: tuple[Header, ...] = ()
        self._events = False
        self.status = 0

    def add_header(self, name: bytes, value: bytes) -> None:
        """A header for the answer, which must not have begun."""
        self._more = (*self._more, (name, value))

    async def finish(self, head: ResponseHead, data: bytes) -> None:
        """The rest of the answer. One that has not begun carries its length."""
        head, data = self._rest(head, data)
        if not self.status:
            await self._begin(head, _length(head, data))
        await self._send({"type": "http.response.body", "body": data})

    def finish_now(self, head: ResponseHead, data: bytes) -> None:
        """The same as :meth:`finish`, at once."""
        assert self._cycle is not None  # noqa: S101 - for those who gave it
        head, data = self._rest(head, data)
        if not self.status:
            self._begin_now(self._cycle, head, _length(head, data))
        self._cycle.write(data, more=False)

    async def empty(self, status: int) -> None:
        """An answer without a body."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*self._ids, *self._more]})
        await self._send({"type": "http.response.body", "body": b""})

    async def write(self, head: ResponseHead, data: bytes) -> None:
        """A piece of a streamed answer."""
        data = self._piece(head, data)
        if not data and self.status:
            return
        if not self.status:
            await self._begin(head, None)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def write_now(self, head: ResponseHead, data: bytes) -> None:
        """The same as :meth:`write`, at once."""
        assert self._cycle is not None  # noqa: S101 - for those who gave it
        data = self._piece(head, data)
        if not self.status:
            self._begin_now(self._cycle, head, None)
        elif not data:
            return
        self._cycle.write(data, more=True)

    async def comment(self, text: str = QUEUED) -> None:
        """A sign of life in an event stream, which begins the answer if need be; nothing in any other answer."""
        if not self.status:
            await self._begin(_KEEPALIVE_HEAD, None)
        if self._events and not self._client_events.inside:
            body = keepalive(self._dialect, text)
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def comment_now(self, text: str = QUEUED) -> None:
        """The same as :meth:`comment`, at once."""
        assert self._cycle is not None  # noqa: S101 - for those who gave it
        if not self.status:
            self._begin_now(self._cycle, _KEEPALIVE_HEAD, None)
        if self._events and not self._client_events.inside:
            self._cycle.write(keepalive(self._dialect, text), more=True)

    async def fail(
        self, error: InferqError, *, headers: Iterable[Header] = (), close: bool = False, mid_event: bool = False
    ) -> None:
        """The error object, with ``headers`` of its own; or an event with it where a stream has begun. ``mid_event``:
        half an event was given out, which ends here: the error is one of its own.

        ``close``: the connection ends after it.
        """
        if self.status:
            body = self._error_event(error, mid_event=mid_event) if self._events else b""
            await self._send({"type": "http.response.body", "body": body})
            return
        status, general, body = error_answer(error, self._dialect, self._request_id)
        self.status = status
        lines = [*general, *headers, *self._ids, *self._more]
        if close:
            lines.append(_CLOSE)
        await self._send({"type": "http.response.start", "status": status, "headers": lines})
        await self._send({"type": "http.response.body", "body": body})

    def _rest(self, head: ResponseHead, data: bytes) -> tuple[ResponseHead, bytes]:
        if head.is_event_stream and (head.status < 400 or has_event_field(data)):
            return head, self._client_events.feed(data) + self._client_events.finish()
        if self._events:  # a comment has begun a stream, and the engine answered without one
            return head, self._as_last_event(head, data)
        return self._refusal(head, data) if head.status >= 400 else (head, data)

    def _piece(self, head: ResponseHead, data: bytes) -> bytes:
        if head.is_event_stream:
            return self._client_events.feed(data)
        return encode_event(data) if self._events else data

    async def _begin(self, head: ResponseHead, length: int | None) -> None:
        headers = [(b"content-type", _header_value(head.content_type)), *self._ids, *self._more]
        if head.headers:
            headers += [(name.encode(), value.encode()) for name, value in head.headers.items()]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if head.is_event_stream:
            headers += _EVENT_STREAM_HEADERS
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})
        self._begun_with(head)

    def _begin_now(self, cycle: RequestCycle, head: ResponseHead, length: int | None) -> None:
        """The same head as :meth:`_begin` sends."""
        lines = [_content_type_line(head.content_type)]
        lines += [header_line(name, value) for name, value in (*self._ids, *self._more)]
        if head.headers:
            lines += [header_line(name.encode(), value.encode()) for name, value in head.headers.items()]
        if length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        if head.is_event_stream:
            lines.append(_EVENT_STREAM_LINES)
        cycle.begin(head.status, b"".join(lines), length)
        self._begun_with(head)

    def _begun_with(self, head: ResponseHead) -> None:
        # Not earlier: after a head that cannot be sent, an error can still be told.
        self.status = head.status
        self._events = head.is_event_stream

    def _error_event(self, error: InferqError, *, mid_event: bool) -> bytes:
        events = self._client_events
        end_of_half = b"\n\n" if mid_event or events.inside else b""
        return end_of_half + error_event(facts_of(error), self._dialect, self._request_id, events.last)

    def _as_last_event(self, head: ResponseHead, data: bytes) -> bytes:
        """A plain answer in a stream that has begun: a refusal as the API's error, anything else as it is."""
        if head.status < 400:
            return encode_event(data)
        facts = facts_of_refusal(head.status, data)
        return error_event(facts, self._dialect, self._request_id, self._client_events.last)

    def _refusal(self, head: ResponseHead, data: bytes) -> tuple[ResponseHead, bytes]:
        """An engine's refusal, in the API's shape."""
        shaped = shaped_refusal(head.status, data, self._dialect, self._request_id)
        return (head, data) if shaped is None else (replace(head, content_type=_JSON), shaped)


def _length(head: ResponseHead, data: bytes) -> int | None:
    """The answer's content-length; None for a status that has no body (RFC 9110, 8.6), whatever the engine sent."""
    return None if head.status in (204, 304) else len(data)


def _content_type_line(content_type: str) -> bytes:
    return (_usual_content_type if len(content_type) < 100 else _content_type)(content_type)


def _content_type(content_type: str) -> bytes:
    return header_line(b"content-type", _header_value(content_type))


_usual_content_type = lru_cache(64)(_content_type)


def _header_value(content_type: str) -> bytes:
    """A worker's content type as a valid header value."""
    value = content_type.encode("latin-1", "replace")
    return value if content_type.isprintable() and value else b"application/octet-stream"
