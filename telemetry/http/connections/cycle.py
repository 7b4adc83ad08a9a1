"""One request and its answer on a connection, as ASGI's ``receive`` and ``send``."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from queue_schemas import InferqError

from ...logs import get_logger

RESUME_BYTES = 64 * 1024
"""How much of a body waits for the app before the connection is read no further."""
_UNKNOWN = 1 << 62
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)

log = get_logger(__name__)


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def header_line(name: bytes, value: bytes) -> bytes:
    """A line of an answer's head. Raises ``RuntimeError`` for what cannot stand in one."""
    if _NAME.fullmatch(name) is None or _BAD_VALUE.search(value) is not None:
        raise RuntimeError(f"the answer has a header that cannot be sent: {name!r}")
    return b"%b: %b\r\n" % (name, value)


_STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


ServeDirectly = Callable[["RequestCycle"], bool]
"""Answers a request that has arrived whole from callbacks, without a task; False, without a trace, to have it served as
ASGI. It does not raise."""


class TaskStarter(Protocol):
    """What runs requests in tasks."""

    def run(self, cycle: RequestCycle, app: ASGIApp) -> None: ...


class ClientConnection(Protocol):
    """What a request uses of the connection it came on."""

    transport: asyncio.Transport
    half_closed: bool
    write_paused: bool
    why_lost: str

    @property
    def starter(self) -> TaskStarter: ...

    @property
    def default_lines(self) -> bytes: ...

    def write(self, data: bytes) -> None: ...

    async def writable(self) -> None: ...

    def resume_reading(self) -> None: ...

    def on_response_complete(self, cycle: RequestCycle) -> None: ...


class RequestCycle:
    """Created when a request's head is complete. Not for use outside its connection, but for :meth:`cut`."""

    __slots__ = (
        "_changed",
        "_chunked",
        "_connection",
        "_delivered",
        "_discard_body",
        "_has_news",
        "_head",
        "_http_1_0",
        "_left_bytes",
        "_on_gone",
        "body",
        "disconnected",
        "expects_continue",
        "keep_alive",
        "last",
        "receiving",
        "refusal",
        "remaining_bytes",
        "response_complete",
        "response_started",
        "scope",
    )

    def __init__(
        self,
        connection: ClientConnection,
        scope: MutableMapping[str, Any],
        *,
        keep_alive: bool,
        remaining_bytes: int | None,
    ) -> None:
        """``remaining_bytes``: how much of the body is to come; None if its chunks will tell."""
        self._connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self.last = not keep_alive
        """It asked for the connection to end behind it."""
        self.expects_continue = False
        self.remaining_bytes = _UNKNOWN if remaining_bytes is None else remaining_bytes
        self.body = bytearray()
        self.receiving = True
        """The end of the request has not come."""
        self.refusal: InferqError | None = None
        """Why the rest of the body is not going to be read."""
        self._has_news = False
        """Something changed since :meth:`receive` looked last."""
        self._changed: asyncio.Event | None = None
        """Set when something changes, while somebody waits for it."""
        self.disconnected = self._delivered = False
        self.response_started = False
        self.response_complete = False
        self._http_1_0 = scope["http_version"] == "1.0"
        self._discard_body = scope["method"] == "HEAD"
        self._chunked = False
        self._head = b""
        """Of the answer, until the first part of its body goes out with it."""
        self._on_gone: Callable[[str], None] | None = None
        self._left_bytes: int | None = 0
        """Of an answer that says its length; None: it ends with the connection."""

    def drop_body(self) -> None:
        """The body, which has arrived to its end, was read from here: the request is not served as ASGI."""
        self.body = bytearray()
        self._delivered = True

    def serve_by(self, app: ASGIApp) -> None:
        """Have ``app``, in a task of its own, go on with a request that was not served as ASGI until now."""
        self._connection.starter.run(self, app)

    @property
    def has_room(self) -> bool:
        """Whether the client takes what is written."""
        return not self._connection.write_paused

    async def run(self, app: ASGIApp) -> None:
        """Let ``app`` answer; if it fails, the client gets a 500 or the connection ends."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._break_off()
            raise
        except Exception:
            log.exception("app_failed", path=self.scope["path"])
            await self._fail()
        else:
            if self._gone and not self.response_complete:
                self._connection.transport.close()
            elif not self.response_complete:
                log.error("answer_incomplete", path=self.scope["path"], begun=self.response_started)
                await self._fail()

    def tell_change(self) -> None:
        """More of the request has come, or nothing more will: wake whoever waits for it."""
        self._has_news = True
        if self._changed is not None:
            self._changed.set()

    async def _until_changed(self) -> None:
        if not self._has_news:
            if self._changed is None:
                self._changed = asyncio.Event()
            await self._changed.wait()
        self._has_news = False
        if self._changed is not None:
            self._changed.clear()

    async def receive(self) -> Message:
        """The next piece of the body. Raises what the connection refuses the body for."""
        if self.expects_continue:
            self._connection.write(_CONTINUE)
            self.expects_continue = False
        if not (self._gone or self.response_complete or self.refusal):
            self._connection.resume_reading()
            await self._until_changed()
        if self._gone or self.response_complete:
            return {"type": "http.disconnect", "why": self._connection.why_lost}
        if self.refusal is not None:
            raise self.refusal
        body, self.body = bytes(self.body), bytearray()
        self._delivered = not self.receiving
        return {"type": "http.request", "body": body, "more_body": self.receiving}

    async def send(self, message: Message) -> None:
        """Write a part of the answer, no faster than it is read; the last part returns once it is all but taken."""
        connection = self._connection
        if connection.write_paused and not self.disconnected:
            await connection.writable()
        if self.disconnected:
            return
        if not self.response_started:
            self._start(message)
            # One write for both where a part of the body follows in the same step, as nearly always.
            asyncio.get_running_loop().call_soon(self._flush_head)
        elif self.response_complete:
            raise RuntimeError(f"{message['type']} was sent after the end of the answer")
        else:
            self.write(message.get("body", b""), more=message.get("more_body", False))
            if self.response_complete and connection.write_paused:
                await connection.writable()

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        """Begin the answer with header ``lines`` (:func:`header_line`), which but for content-length say nothing of its
        framing; ``length``: that of its body, None if its end will tell. It goes out with the first :meth:`write`."""
        self.response_started = True
        if self.receiving and (self.expects_continue or self.refusal or self.remaining_bytes > RESUME_BYTES):
            self.keep_alive = False  # what is left of the body is not worth reading
        self.expects_continue = False
        framing = b""
        if status < 200 or status in (204, 304):
            self._discard_body = True
        elif length is None:
            self._chunked = not self._discard_body and not self._http_1_0
            if self._chunked:
                framing = b"transfer-encoding: chunked\r\n"
            self._left_bytes = None
        else:
            self._left_bytes = length
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self._head = b"".join((_STATUS_LINES[status], self._connection.default_lines, lines, framing, end))

    def write(self, data: bytes, *, more: bool) -> None:
        """Write a part of the answer, which has begun, without waiting for :attr:`has_room`."""
        if self.disconnected:
            return
        self._write(data, more=more)
        if self.response_complete:
            self._connection.on_response_complete(self)

    @property
    def _gone(self) -> bool:
        """Whether the client is, or has sent all it had to and may be."""
        return self.disconnected or (self._delivered and self._connection.half_closed)

    def cut(self) -> None:
        """Drop the connection at once, with what the client has not read."""
        self._connection.transport.abort()

    def refuse(self, error: InferqError) -> None:
        """The rest of the body is not going to be read: ``receive`` raises ``error``."""
        if self.refusal is None:
            self.refusal = error
            self.keep_alive = False
            self.tell_change()

    def leave(self) -> None:
        """The client is gone."""
        self.disconnected = True
        self._client_changed()

    def end_of_input(self) -> None:
        """The client sends nothing more."""
        self._client_changed()

    def watch(self, on_gone: Callable[[str], None] | None) -> None:
        """Have ``on_gone`` called once, with the reason, when the client is gone; None: no more. The body must have
        been read."""
        self._on_gone = on_gone
        if on_gone is not None:
            self._connection.resume_reading()
            if self._gone:
                asyncio.get_running_loop().call_soon(self._client_changed)

    def _client_changed(self) -> None:
        self.tell_change()
        on_gone = self._on_gone
        if on_gone is not None and self._gone:
            self._on_gone = None
            on_gone(self._connection.why_lost)

    def _start(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"the answer began with {message['type']}")
        lines: list[bytes] = []
        length = self._headers(message.get("headers", ()), lines)
        self.begin(message["status"], b"".join(lines), length)

    def _flush_head(self) -> None:
        head, self._head = self._head, b""
        if head and not self.disconnected:
            self._connection.write(head)

    def _headers(self, headers: Iterable[tuple[bytes, bytes]], lines: list[bytes]) -> int | None:
        """Add ``headers`` to ``lines``; the length of the body, if one of them tells it."""
        length = None
        for given, value in headers:
            name = given.lower()
            if name == b"connection":
                if b"close" in value.lower():
                    self.keep_alive = False
                continue
            if name == b"transfer-encoding":
                continue  # the connection decides it
            if name == b"content-length":
                length = int(value)
            lines.append(header_line(name, value))
        return length

    def _write(self, data: bytes, *, more: bool) -> None:
        if self._discard_body:
            data = b""
        elif self._chunked:
            end = b"" if more else b"0\r\n\r\n"
            data = b"%x\r\n%b\r\n%b" % (len(data), data, end) if data else end
        elif self._left_bytes is not None:
            self._left_bytes -= len(data)
            if self._left_bytes < 0 or (self._left_bytes and not more):
                raise RuntimeError("the answer is not as long as its content-length says")
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            self._connection.write(data)
        self.response_complete = not more

    async def _fail(self) -> None:
        if self.response_started or self.disconnected:
            self._break_off()
            return
        body = InferqError("something went wrong here; the log says what").body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send(
            {"type": "http.response.start", "status": 500, "headers": [*headers, (b"connection", b"close")]}
        )
        await self.send({"type": "http.response.body", "body": body})

    def _break_off(self) -> None:
        """End the connection so that the client can tell the answer is not whole."""
        self._flush_head()
        transport = self._connection.transport
        if self.response_started and not self._chunked and not self.response_complete:
            connected = transport.get_extra_info("socket")
            if connected is not None:  # the end of the connection would be the end of the answer: reset it instead
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        else:
            transport.close()
