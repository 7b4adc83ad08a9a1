"""HTTP/1.1 connections to an engine, and the pool that reuses them.

A connection carries another exchange only if the last one's answer was read to its very end and nothing else has come:
whatever is left of one answer would begin the next, which is somebody else's.

A general HTTP client spends four times the CPU of this per call (measured: 240 against 60 microseconds), which is more
than everything else that a worker does for a request. What is left out is what an engine's API never needs:
redirects, cookies, compression, proxies, pipelining, uploads in pieces.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from queue_schemas import EngineFailed
from queue_schemas.headers import CLIENT_HEADERS

from .port import EngineGone
from .step_reader import StepReader

CONNECT_LIMIT_S = 5.0
IDLE_LIMIT_S = 4.0
"""Below the 5 s after which uvicorn, and so vLLM, closes an idle connection."""
PAUSE_BYTES = 256 * 1024
"""Unread bytes of an answer at which reading stops, so that TCP slows the engine."""
STEP_BYTES = 64 * 1024
"""Most that is read of one stream in a step."""
MAX_HEAD_BYTES = 64 * 1024
"""Of a head, and of chunk framing or trailers without a byte of body between."""


class _Refused(Exception):
    """Raised by the parser's callbacks with a sentence: it is HTTP, but no answer that can be taken."""


class EngineConnection(asyncio.Protocol):
    """A connection that carries one exchange at a time. Made by :class:`ConnectionPool`; ``peer`` is who is at its
    other end, for sentences."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.status = 0
        self.content_type = ""
        self.headers: dict[str, str] = {}
        """Of the answer, those that its client is to see."""
        self.complete = True
        """Whether the answer has arrived to its end: no exchange is under way."""
        self.usable = True
        """Whether the connection stands, as far as is known, and the server is willing to go on."""
        self.silent = False
        """Whether the server has not sent one byte since the request."""
        self.delimited = True
        """Whether length or chunks said where the complete answer ends; False: only that the connection was closed."""
        self.lost_after_s = 0.0
        """How long after the request was sent the connection failed, if it did."""
        self.idle_since = 0.0
        self._sent_at = 0.0
        # Asking for the running loop, as for each call and wait here, is a system call (getpid) in Python 3.11.
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unread = select.poll()
        self._parser: Any = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._size = 0
        self._no_body_bytes = 0
        self._has_head = False
        self._ends_with_connection = True
        self._paused = False
        self._error = ""
        self._lost = False
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], None] | None = None
        """Gets the body while it is read in steps, by ``_step_reader`` from ``_fd``."""
        self._take_error: Exception | None = None
        self._read_error: OSError | None = None
        self._step_reader: StepReader | None = None
        self._fd = -1

    @property
    def drained(self) -> bool:
        """Whether the answer was read to its very end: nothing of it is left here."""
        return self.complete and not self._parts

    @property
    def quiet(self) -> bool:
        """Whether nothing lies unread in the socket either: unexpected bytes, or the end."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is None or sock.fileno() < 0:
            return False
        return not self._unread.poll(0)

    def send(self, request: bytes) -> None:
        """Begin an exchange."""
        assert self._transport is not None  # noqa: S101 - connected when it is made
        assert self.drained  # noqa: S101 - else another request's answer would begin this one's
        self.status = 0
        self.complete = self._has_head = False
        self.silent = self.delimited = True
        self._no_body_bytes = 0
        self._sent_at = time.monotonic()
        if self._transport.is_closing():
            self._fail(f"{self._peer} broke the connection before it was asked")
        else:
            self._transport.write(request)

    async def head(self) -> None:
        """Wait for status and headers. Raises ``EngineFailed``, ``EngineGone`` if the server broke off."""
        while not self._has_head:
            await self._news()

    async def piece(self) -> bytes:
        """What has arrived of the body since the last call, waiting for some; empty at its end."""
        while not self._parts:
            if self.complete:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        """Pass ``take`` what has arrived, have ``reader`` read and pass on the rest; return at the end of the answer.

        False, and nothing done, where that cannot be (TLS, or the reader is not open), and if nothing is left to be
        read. Raises as :meth:`piece` does, and what ``take`` raises.
        """
        transport = self._transport
        if not reader.is_open or transport is None or transport.get_extra_info("sslcontext") is not None:
            return False
        if self.complete or self._error or transport.is_closing():
            return False
        # The transport keeps the socket: it writes, and finds out how the connection ended.
        transport.pause_reading()
        self._fd = transport.get_extra_info("socket").fileno()
        self._take, self._take_error = take, None
        self._paused = False
        self._step_reader = reader
        reader.add(self._fd, self._read_step)
        try:
            if self._parts:
                self._hand_over(take)
            while not self.complete and self._take_error is None:
                await self._news()
        finally:
            self._take = None
            self._leave_steps()
        if self._take_error is not None:
            raise self._take_error
        return True

    def close(self) -> None:
        """Drop the connection at once: an engine that still works on an answer aborts it."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def _read_step(self) -> None:
        try:
            data = os.read(self._fd, STEP_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # The socket says it once: the transport will find an orderly end.
            self._read_error = error
            data = b""
        if data:
            self.data_received(data)
        else:
            self._leave_steps()

    def _leave_steps(self) -> None:
        """Let the transport read again."""
        reader, self._step_reader = self._step_reader, None
        if reader is not None:
            reader.remove(self._fd)
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def _hand_over(self, take: Callable[[bytes], None]) -> None:
        """Pass on what of the body has arrived."""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        try:
            take(data)
        except Exception as error:  # noqa: BLE001 - raised where the end of the answer is awaited
            self._take_error = error
            self._leave_steps()
            self._tell()

    async def _news(self) -> None:
        if self._error:
            raise EngineGone(self._error) if self._lost else EngineFailed(self._error)
        self._waiter = self._loop.create_future()
        await self._waiter

    def _tell(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, why: str) -> None:
        if not self.complete and not self._error:
            self._error = why
            self.lost_after_s = time.monotonic() - self._sent_at
        self.usable = False
        self._tell()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self._unread.register(sock.fileno(), select.POLLIN)
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.complete:
            # Nobody asked for it: taken for the next answer, it would reach another client.
            self.close()
            return
        self.silent = False
        size = self._size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._parts and self._take is not None:
                self._hand_over(self._take)  # what came before
            refused = error.__context__  # by a callback of ours
            self._fail(str(refused) if isinstance(refused, _Refused) else f"{self._peer} does not speak HTTP: {error}")
            self.close()
            return
        if self._size == size and not self.complete:
            self._no_body_bytes += len(data)
            if self._no_body_bytes > MAX_HEAD_BYTES:
                where = "what frames its body" if self._has_head else "its head"
                self._fail(f"{self._peer}'s answer has no end in {where}")
                self.close()
        elif self._take is not None:
            if self._parts:
                self._hand_over(self._take)
            if not self.complete:
                return
        elif self._size > PAUSE_BYTES and not self.complete and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        if self._parts or self.complete or self._has_head:
            self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        exc = exc or self._read_error
        self.usable = False
        self._leave_steps()
        if self._has_head and not self.complete and self._ends_with_connection and exc is None:
            self.complete = True
            self.delimited = False
            self._tell()
        else:
            self._lost = not self._error
            where = "before its answer was complete" if self._has_head else "before it answered"
            self._fail(f"{self._peer} broke the connection {where}{f' ({exc})' if exc else ''}")
        self._parser = None  # it holds us, and we it

    # httptools

    def on_message_begin(self) -> None:
        if self.complete:
            raise _Refused(f"{self._peer} sent a second answer behind the first")
        # Nothing that an interim answer (1xx) said holds for the one that follows.
        self.content_type = "application/octet-stream"
        self.headers = {}
        self._ends_with_connection = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # a trailer: the answer was judged, and perhaps passed on, by its head
        name = name.lower()
        if name == b"content-type":
            kind, semicolon, parameters = value.decode("latin-1").partition(";")
            self.content_type = kind.strip().lower() + semicolon + parameters
        elif name == b"content-length":
            self._ends_with_connection = False
        elif name in (b"transfer-encoding", b"content-encoding"):
            coding = value.decode("latin-1").strip().lower()
            if coding == "chunked" and name == b"transfer-encoding":
                self._ends_with_connection = False
            elif coding not in ("", "identity"):
                raise _Refused(
                    f"{self._peer} answers in the coding {coding[:60]!r}, which the worker did not ask for: switch "
                    "compression off there, or in the proxy before it"
                )
        elif (known := name.decode("latin-1")) in CLIENT_HEADERS:
            text = value.decode("latin-1")
            self.headers[known] = f"{self.headers[known]}, {text}" if known in self.headers else text

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status > 599:
            raise _Refused(f"{self._peer} does not speak HTTP: there is no status {self.status}")
        if self.status == 101:
            raise _Refused(f"{self._peer} switches to another protocol, which the worker did not ask for")
        # 1xx: the answer proper follows.
        self._has_head = self.status >= 200

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        self._no_body_bytes = 0

    def on_message_complete(self) -> None:
        if self._has_head:
            self.complete = True
            self.usable = self.usable and self._parser.should_keep_alive() and self._is_sent

    @property
    def _is_sent(self) -> bool:
        """Whether nothing of the request is left to be sent: an engine that answered before it had read all may never
        read the rest, and whatever is sent next would wait behind that."""
        return self._transport is not None and self._transport.get_write_buffer_size() == 0


class ConnectionPool:
    """Connections to the server at ``base_url`` (http or https), called ``peer`` in sentences. They are kept while they
    are fresh, without timers. ``tls``: None for the system's certificates."""

    def __init__(self, base_url: str, peer: str = "the engine", tls: ssl.SSLContext | None = None) -> None:
        url = urlsplit(base_url)
        self._peer = peer
        self._host = url.hostname or ""
        self._tls = (tls or ssl.create_default_context()) if url.scheme == "https" else None
        self._port = url.port or (443 if self._tls else 80)
        self._idle: list[EngineConnection] = []
        self._closed = False

    def take(self) -> EngineConnection | None:
        """A connection that was used before, the one most recently; None if there is none."""
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < IDLE_LIMIT_S and connection.quiet:
                return connection
            connection.close()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises ``EngineFailed`` if there is none to be had in time."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"ssl": self._tls, "server_hostname": self._host} if self._tls else {}
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(self._peer), self._host, self._port, **options
                )
        except TimeoutError as error:
            raise EngineFailed(f"{self._peer} does not accept connections within {CONNECT_LIMIT_S:.0f} s") from error
        except OSError as error:
            sentence = f"{self._peer} cannot be reached"
            raise EngineFailed(f"{sentence}: {error}", public=sentence) from error
        return connection

    def give_back(self, connection: EngineConnection) -> None:
        """Keep ``connection`` for the next exchange if nothing is left of its last one; else close it."""
        if connection.drained and connection.usable and not self._closed:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and what is given back from now on."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
