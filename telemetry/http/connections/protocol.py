"""The HTTP/1.1 protocol of uvicorn's server: one client connection, from its first byte to its last.

Bounds all that a peer may do to the server: the bytes it sends (heads, bodies and their framing, pipelined requests,
what still comes after an answer), the time it takes, and the bytes it leaves unread. :class:`Connections` checks the
times of all connections at once: no request sets a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from queue_schemas import BadRequest, HeadTooLarge, InferqError, MethodNotAllowed

from ...logs import get_logger
from .cycle import RESUME_BYTES, RequestCycle, ServeDirectly
from .flow import FlowControl
from .received_body import ReceivedBody
from .refusals import answer_with
from .registry import Connections
from .request_head import RequestHead, request_parser
from .request_scope import Endpoints, endpoints, request_scope
from .starter import RequestStarter
from .unread_bytes import UnreadBytes

_NEVER = float("inf")

log = get_logger(__name__)


class HttpConnection(FlowControl):
    """HTTP/1.1 for uvicorn's server; ``connections`` has the limits. A request for the app that has arrived whole is
    offered to ``serve_directly`` first."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
        serve_directly: ServeDirectly | None = None,
    ) -> None:
        super().__init__()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # connection_made brings it
        self._app: ASGIApp = config.loaded_app
        self._server = server_state
        self._app_state = app_state
        self._connections = connections
        self._limits = connections.limits
        self._loop = _loop or asyncio.get_running_loop()
        self.starter = RequestStarter(self._loop, server_state, self._app, serve_directly)
        self._ends: Endpoints = (None, None)
        # The request that arrives: its head, then its body.
        self._head = RequestHead()
        self.on_url, self.on_header = self._head.on_url, self._head.on_header
        self._parser = request_parser(self)
        self._head_bytes = 0
        self._head_since_s = _NEVER
        self._declining = False
        """The parser took an offer to upgrade for the end of HTTP: what it still says of this request is wrong."""
        self._incoming: RequestCycle | None = None
        self._received = ReceivedBody(self._limits)
        self._read_paused = False
        # The request that is answered, and those that wait behind it.
        self._active: RequestCycle | None = None
        self._pipelined: deque[tuple[RequestCycle, ASGIApp]] = deque()
        self._pipelined_bytes = 0
        self._idle_since_s = _NEVER
        self._discarding = False
        """Whether all further input is discarded."""
        self._discarded_bytes = 0
        self._linger_until_s = _NEVER
        self.half_closed = False
        """The client sends nothing more, and perhaps still reads."""
        self.why_lost = "left"
        self._unread = UnreadBytes(self._limits)

    # The event loop and uvicorn's server call these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's
        self._ends = endpoints(transport)
        self._server.connections.add(self)  # type: ignore[arg-type]  # a set of uvicorn's own kinds
        self._head_since_s = self._loop.time()
        if self._connections.add(self):
            self._connections.idle(self)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._connections.discard(self)
        self._pipelined.clear()
        for cycle in (self._active, self._incoming):
            if cycle is not None and not cycle.response_complete:
                cycle.leave()
        self._parser = self._active = self._incoming = None  # they hold us, and we them
        self.resume_writing()

    def eof_received(self) -> bool:
        """The client has closed, or just sends nothing more: nobody can tell. What is computed at once it may still
        read; an app that waits for something is told that the client is gone."""
        active = self._active
        if active is None or active.response_complete or active.receiving:
            return False
        self.half_closed = self._discarding = True
        active.end_of_input()
        return True

    def shutdown(self) -> None:
        """The server ends: what is answered now is the last."""
        if self._active is None or self._active.response_complete:
            self.transport.close()
        else:
            self._stop_listening()

    def data_received(self, data: bytes) -> None:
        self.starter.reading = True
        try:
            self._read(data)
        finally:
            self.starter.end_read()

    def _read(self, data: bytes) -> None:
        size = len(data)
        if self._discarding:
            self._discard(size)
            return
        head = self._head
        self._received.receive(size, self._loop.time())
        incoming, active = self._incoming if head.reading else None, self._active
        if active is not None and not active.receiving and not active.response_complete:
            self._pipelined_bytes += size
        self._feed(data)
        if self._discarding:
            return
        if not head.reading:
            self._check_framing()
        elif self._incoming is incoming:  # all of it belongs to one head
            self._idle_since_s = _NEVER
            self._head_bytes += size
            if self._head_since_s == _NEVER:
                self._head_since_s = self._received.received_s
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(HeadTooLarge(f"the request's headers have more than {self._limits.head_bytes} bytes"))
        if self._pipelined_bytes > self._limits.pipelined_bytes:
            self._stop_listening()

    # The parser calls these.

    def on_message_begin(self) -> None:
        if self._discarding:
            return
        if len(self._pipelined) >= self._limits.pipelined_requests:
            self._stop_listening()
            return
        self._head.begin()
        if self._head_since_s == _NEVER:
            self._head_since_s = self._received.received_s

    def on_headers_complete(self) -> None:
        if self._discarding:
            return
        parser = self._parser
        if not parser.should_upgrade():
            self._begin_request(parser.get_method(), parser.get_http_version(), keep_alive=parser.should_keep_alive())
        elif parser.get_method() == b"CONNECT":
            self._refuse(MethodNotAllowed("this is no proxy: CONNECT is not answered"))
        else:
            self._declining = True

    def on_body(self, body: bytes) -> None:
        cycle = self._incoming
        if self._discarding or cycle is None:
            return
        size = len(body)
        self._received.add(size)
        cycle.remaining_bytes -= size
        if cycle.response_complete:
            self._discard(size)
            return
        cycle.body += body
        if len(cycle.body) > RESUME_BYTES and cycle is self._active and not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()
        cycle.tell_change()

    def on_message_complete(self) -> None:
        cycle = self._incoming
        if self._discarding or self._declining or cycle is None:
            return
        cycle.receiving = False
        self._head.reading, self._head_bytes, self._head_since_s = True, 0, _NEVER
        if cycle.last:
            self._discarding = True
        if cycle.response_complete:
            self._linger_until_s = _NEVER
            self._next_or_close(cycle)
        else:
            self.starter.arrived(cycle)

    # Requests call these.

    @property
    def default_lines(self) -> bytes:
        return self._connections.default_lines(self._server.default_headers)

    def write(self, data: bytes) -> None:
        """Write a part of an answer; nothing once the connection closes, which its request is told of by itself."""
        if self.transport.is_closing():
            return
        self._unread.written_bytes += len(data)
        self.transport.write(data)

    def resume_reading(self) -> None:
        """A request has room for more of its body."""
        if self._read_paused:
            self._read_paused = False
            self._received.restart_clock(self._loop.time())
            self.transport.resume_reading()

    def on_response_complete(self, cycle: RequestCycle) -> None:
        """A request is answered."""
        self._server.total_requests += 1
        self.resume_reading()
        if self.transport.is_closing():
            return
        if cycle.receiving:
            self._linger(end=not cycle.keep_alive)
        else:
            self._next_or_close(cycle)

    def drop(self, why: str) -> None:
        """End the connection at once."""
        log.info("connection_dropped", why=why)
        self.why_lost = why
        self._connections.discard(self)
        self.transport.abort()

    # The sweep calls this.

    def check(self, now_s: float) -> None:
        """Enforce the limits in time."""
        unread = self.transport.get_write_buffer_size()
        why = self._unread.check(unread, now_s)
        if why:
            self.drop(why)
            return
        if unread and self._linger_until_s != _NEVER:
            self._linger_until_s = now_s + self._limits.linger_s
        if now_s >= self._linger_until_s:
            self.drop("sends_on")
        elif now_s - self._idle_since_s >= self._limits.keep_alive_s:
            self.transport.close()
        elif now_s - self._head_since_s >= self._limits.head_timeout_s:
            if self._active is None or self._active.response_complete:
                self.drop("head_timeout")
            else:
                self._stop_listening()
        elif (cycle := self._incoming) is not None and cycle.receiving:
            if self._read_paused or cycle.expects_continue or cycle is not self._active:
                self._received.restart_clock(now_s)
            elif (fault := self._received.check_rate(now_s)) is not None:
                cycle.refuse(fault)

    # What arrives.

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self._discarding:
                    return
                data = self._without_upgrade() + data[offer.args[0] :]
            except httptools.HttpParserError as error:
                self._malformed(str(error))
                return
            else:
                return

    def _without_upgrade(self) -> bytes:
        """The head without its upgrade, for a new parser: this one would read on in the other protocol."""
        head = self._head.without_upgrade(self._parser.get_method(), self._parser.get_http_version())
        self._parser, self._declining = request_parser(self), False
        return head

    def _malformed(self, why: str) -> None:
        cycle = self._incoming
        if cycle is None or not cycle.receiving:
            if not self._discarding:
                self._refuse(BadRequest(f"this is not an HTTP request as RFC 9112 has it: {why}"))
            return
        self._refuse_rest(cycle, BadRequest(f"the request's body is not framed as RFC 9112 says: {why}"))

    def _begin_request(self, method: bytes, version: str, *, keep_alive: bool) -> None:
        head = self._head
        try:
            head.check(version, self._head_bytes + self._received.wire_bytes, self._limits)
            target = head.target()
        except InferqError as error:
            self._refuse(error)
            return
        scope = request_scope(self._ends, method, version, target, head.headers, self._app_state)
        self._take(scope, self._app, keep_alive=keep_alive and version == "1.1", body_bytes=head.body_bytes)

    def _take(self, scope: dict[str, Any], app: ASGIApp, *, keep_alive: bool, body_bytes: int | None) -> None:
        cycle = RequestCycle(self, scope, keep_alive=keep_alive, remaining_bytes=body_bytes)
        cycle.expects_continue = self._head.expects_continue
        self._incoming = cycle
        self._head.reading, self._head_since_s, self._idle_since_s = False, _NEVER, _NEVER
        self._received.begin()
        self._connections.busy(self)
        if self._active is None or self._active.response_complete:
            self._start(cycle, app)
        else:
            self._pipelined.append((cycle, app))

    def _start(self, cycle: RequestCycle, app: ASGIApp) -> None:
        self._active = cycle
        self._pipelined_bytes = 0
        self.starter.start(cycle, app)

    def _refuse(self, error: InferqError) -> None:
        """Answer what is no request, after those that came before it; then the connection ends."""
        self._head.headers = []
        scope = request_scope(self._ends, b"GET", "1.1", (b"", b""), self._head.headers, self._app_state)
        self._take(scope, answer_with(error), keep_alive=False, body_bytes=None)
        self._discarding = True

    # How much of it, and how fast.

    def _check_framing(self) -> None:
        cycle = self._incoming
        fault = self._received.check_framing()
        if cycle is not None and fault is not None:
            self._refuse_rest(cycle, fault)

    def _refuse_rest(self, cycle: RequestCycle, error: InferqError) -> None:
        """Read nothing more of a body that cannot be read."""
        self._discarding = True
        cycle.refuse(error)
        if cycle.response_complete:
            self._linger(end=True)

    def _discard(self, size: int) -> None:
        self._discarded_bytes += size
        if self._discarded_bytes > self._limits.linger_bytes:
            self.drop("sends_on")

    def _stop_listening(self) -> None:
        """The answer that is under way is the last: what else was asked is not answered."""
        self._discarding = True
        # The client may still send it: then the end of the connection must not take the answer from it.
        self._discarded_bytes += self._pipelined_bytes
        self._pipelined.clear()
        self._incoming = self._active
        if self._active is not None:
            self._active.keep_alive = False

    # How it goes on, or ends.

    def _next_or_close(self, cycle: RequestCycle) -> None:
        if cycle.keep_alive and self._pipelined:
            self._start(*self._pipelined.popleft())
        elif not cycle.keep_alive or self._discarding:
            if self._discarded_bytes and not self.half_closed:
                self._linger(end=True)
            else:
                self.transport.close()
        else:
            self._idle_since_s = self._loop.time()
            self._connections.idle(self)

    def _linger(self, *, end: bool) -> None:
        """The answer is out, and the client may still send: hear it out for a while."""
        self._linger_until_s = self._loop.time() + self._limits.linger_s
        if end:
            self._discarding = True
            if self.transport.can_write_eof():
                with contextlib.suppress(OSError):  # the client is gone: connection_lost follows
                    self.transport.write_eof()
