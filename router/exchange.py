"""One answer on its way to the client: what has begun cannot begin again, and an error takes the form that fits."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Send

from queue_schemas import InferqError
from telemetry.asgi import error_answer

from .core import EVENT_STREAM, Head

Header = tuple[bytes, bytes]

_COMMENT = b": queued\n\n"
_KEEPALIVE_HEAD = Head(200, f"{EVENT_STREAM}; charset=utf-8")
_EVENT_STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_CLOSE = (b"connection", b"close")


class Exchange:
    """Sends one answer. ``status`` is 0 until it has begun. Every answer carries ``x-request-id``."""

    __slots__ = ("_events", "_id_header", "_more", "_send", "status")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._id_header = (b"x-request-id", request_id)
        self._more: tuple[Header, ...] = ()
        self._events = False
        self.status = 0

    def add_header(self, name: bytes, value: bytes) -> None:
        """A header for the answer, which must not have begun."""
        self._more = (*self._more, (name, value))

    async def finish(self, head: Head, data: bytes) -> None:
        """The rest of the answer. One that has not begun carries its length."""
        if not self.status:
            await self._begin(head, (b"content-length", b"%d" % len(data)))
        elif not head.is_event_stream and self._events:
            data = _as_event(data)  # a comment has begun a stream, and the engine answered without one
        await self._send({"type": "http.response.body", "body": data})

    async def write(self, head: Head, data: bytes) -> None:
        """A piece of a streamed answer."""
        if not self.status:
            await self._begin(head, None)
        elif not head.is_event_stream and self._events:
            data = _as_event(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def comment(self) -> None:
        """A comment in an event stream, which begins the answer if need be; nothing in any other answer."""
        if not self.status:
            await self._begin(_KEEPALIVE_HEAD, None)
        if self._events:
            await self._send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

    async def fail(
        self, error: InferqError, *, headers: Iterable[Header] = (), close: bool = False, mid_event: bool = False
    ) -> None:
        """The error object, with ``headers`` of its own; or an event with it where a stream has begun. ``mid_event``:
        half an event was given out, which ends here: the error is one of its own.

        ``close``: the connection ends after it.
        """
        if self.status:
            body = (b"\n\n" if mid_event else b"") + _as_event(error.body()) if self._events else b""
            await self._send({"type": "http.response.body", "body": body})
            return
        status, general, body = error_answer(error)
        self.status = status
        lines = [*general, *headers, self._id_header, *self._more]
        if close:
            lines.append(_CLOSE)
        await self._send({"type": "http.response.start", "status": status, "headers": lines})
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, head: Head, length: Header | None) -> None:
        self.status = head.status
        self._events = head.is_event_stream
        headers = [(b"content-type", _header_value(head.content_type)), self._id_header, *self._more]
        if length is not None:
            headers.append(length)
        if self._events:
            headers += _EVENT_STREAM_HEADERS
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})


def _as_event(data: bytes) -> bytes:
    return b"".join(b"data: %b\n" % line for line in data.splitlines()) + b"\n"


def _header_value(content_type: str) -> bytes:
    """A worker's word, made fit for a header."""
    value = content_type.encode("latin-1", "replace")
    return value if content_type.isprintable() and value else b"application/octet-stream"
