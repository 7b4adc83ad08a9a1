"""One connection of a client, from its first byte to its last.

Owns all that a peer may do to the server: the bytes it sends (heads, bodies and their framing, pipelined requests, what
still comes after an answer), the time it takes, and the bytes it leaves unread. :class:`Connections` has the times
checked for all connections at once: no request sets a timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from queue_schemas import (
    BadRequest,
    BodyTooLarge,
    HeadTooLarge,
    InferqError,
    MethodNotAllowed,
    RequestTimeout,
    VersionRefused,
)

from ...logs import get_logger
from .cycle import RESUME_BYTES, RequestCycle
from .refusals import answer_with
from .registry import Connections
from .unread import UnreadBytes

_NEVER = float("inf")
_OFFERS = (b"upgrade", b"http2-settings")
_FRAMING = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})

log = get_logger(__name__)


class HttpConnection(asyncio.Protocol):
    """HTTP/1.1 for uvicorn's server; ``connections`` has the limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # connection_made brings it
        self._app: ASGIApp = config.loaded_app
        self._server = server_state
        self._app_state = app_state
        self._connections = connections
        self._limits = connections.limits
        self._loop = _loop or asyncio.get_running_loop()
        self._peer: Any = None
        self._own: Any = None
        self._parser: Any = self._new_parser()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._hosts = 0
        self._length: int | None = 0
        self._coding = b""
        self._expects_continue = False
        # The request that arrives: its head, then its body.
        self._reading_head = True
        self._head_bytes = 0
        self._head_since_s = _NEVER
        self._declining = False
        """The parser took an offer to upgrade for the end of HTTP: what it still says of this request is wrong."""
        self._incoming: RequestCycle | None = None
        self._body_bytes = self._wire_bytes = self._window_bytes = 0
        self._heard_s = self._window_s = 0.0
        self._read_paused = False
        # The request that is answered, and those that wait behind it.
        self._active: RequestCycle | None = None
        self._behind: deque[tuple[RequestCycle, ASGIApp]] = deque()
        self._ahead_bytes = 0
        self._idle_since_s = _NEVER
        self._deaf = False
        """Whatever else comes is discarded."""
        self._discarded_bytes = 0
        self._linger_until_s = _NEVER
        self.half_closed = False
        """The client sends nothing more, and perhaps still reads."""
        self.why_lost = "left"
        self.write_paused = False
        self._writable: asyncio.Event | None = None
        self._unread = UnreadBytes(self._limits)

    # The event loop and uvicorn's server call these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's
        self._peer, self._own = _address(transport, "peername"), _address(transport, "sockname")
        self._server.connections.add(self)  # type: ignore[arg-type]  # a set of uvicorn's own kinds
        self._head_since_s = self._loop.time()
        if self._connections.add(self):
            self._connections.idle(self)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._connections.discard(self)
        self._parser = None  # it holds us, and we it
        self._behind.clear()
        for cycle in (self._active, self._incoming):
            if cycle is not None and not cycle.response_complete:
                cycle.leave()
        self.resume_writing()

    def eof_received(self) -> bool:
        """The client has closed, or just sends nothing more: nobody can tell. What is computed at once it may still
        read; an app that waits for something is told that the client is gone."""
        active = self._active
        if active is None or active.response_complete or active.receiving:
            return False
        self.half_closed = self._deaf = True
        active.news.set()
        return True

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    def shutdown(self) -> None:
        """The server ends: what is answered now is the last."""
        if self._active is None or self._active.response_complete:
            self.transport.close()
        else:
            self._stop_listening()

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if self._deaf:
            self._discard(size)
            return
        self._heard_s = self._loop.time()
        self._wire_bytes += size
        incoming, active = self._incoming if self._reading_head else None, self._active
        if active is not None and not active.receiving and not active.response_complete:
            self._ahead_bytes += size
        self._feed(data)
        if self._deaf:
            return
        if not self._reading_head:
            self._check_framing()
        elif self._incoming is incoming:  # all of it belongs to one head
            self._idle_since_s = _NEVER
            self._head_bytes += size
            if self._head_since_s == _NEVER:
                self._head_since_s = self._heard_s
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(HeadTooLarge(f"the request's headers have more than {self._limits.head_bytes} bytes"))
        if self._ahead_bytes > self._limits.pipelined_bytes:
            self._stop_listening()

    # The parser calls these.

    def on_message_begin(self) -> None:
        if self._deaf:
            return
        if len(self._behind) >= self._limits.pipelined_requests:
            self._stop_listening()
            return
        self._begin_head()
        if self._head_since_s == _NEVER:
            self._head_since_s = self._heard_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._reading_head:
            return  # a trailer: it changes nothing of its request
        name = name.lower()
        self._headers.append((name, value))
        if name not in _FRAMING:
            return
        if name == b"host":
            self._hosts += 1
        elif name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._length, self._coding = None, self._coding + b"," + value if self._coding else value
        else:
            self._expects_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        if self._deaf:
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
        if self._deaf or cycle is None:
            return
        size = len(body)
        self._body_bytes += size
        self._window_bytes += size
        cycle.to_come_bytes -= size
        if cycle.response_complete:
            self._discard(size)
            return
        cycle.body += body
        if len(cycle.body) > RESUME_BYTES and cycle is self._active and not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()
        cycle.news.set()

    def on_message_complete(self) -> None:
        cycle = self._incoming
        if self._deaf or self._declining or cycle is None:
            return
        cycle.receiving = False
        self._reading_head, self._head_bytes, self._head_since_s = True, 0, _NEVER
        if cycle.last:
            self._deaf = True
        if cycle.response_complete:
            self._linger_until_s = _NEVER
            self._go_on(cycle)
        else:
            cycle.news.set()

    # Requests call these.

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server.default_headers

    def write(self, data: bytes) -> None:
        """Write a part of an answer; nothing once the connection closes, which its request is told of by itself."""
        if self.transport.is_closing():
            return
        self._unread.written_bytes += len(data)
        self.transport.write(data)

    async def writable(self) -> None:
        """Until the client has taken most of what was written."""
        if self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()

    def resume_reading(self) -> None:
        """A request has room for more of its body."""
        if self._read_paused:
            self._read_paused = False
            self._heard_s = self._window_s = self._loop.time()
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
            self._go_on(cycle)

    def drop(self, why: str) -> None:
        """End the connection at once."""
        log.info("client_dropped", why=why)
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
        elif self._incoming is not None and self._incoming.receiving:
            self._check_body(self._incoming, now_s)

    # What arrives.

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # What follows a request that ends the connection is discarded here, and is no error of that request.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _begin_head(self) -> None:
        self._url = b""
        self._headers = []
        self._hosts = 0
        self._length = 0
        self._coding = b""
        self._expects_continue = False

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self._deaf:
                    return
                data = self._without_offer() + data[offer.args[0] :]
            except httptools.HttpParserError as error:
                self._malformed(str(error))
                return
            else:
                return

    def _without_offer(self) -> bytes:
        """The head of a request that offers to go on in another protocol, without the offer, for a new parser: this
        one would take what follows for the other protocol."""
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, self._url, version)]
        lines += [b"%b: %b\r\n" % header for header in self._headers if header[0] not in _OFFERS]
        self._parser, self._declining = self._new_parser(), False
        return b"".join([*lines, b"\r\n"])

    def _malformed(self, why: str) -> None:
        cycle = self._incoming
        if cycle is None or not cycle.receiving:
            if not self._deaf:
                self._refuse(BadRequest(f"this is not an HTTP request as RFC 9112 has it: {why}"))
            return
        self._deaf = True
        cycle.refuse(BadRequest(f"the request's body is not framed as RFC 9112 says: {why}"))
        if cycle.response_complete:
            self._linger(end=True)

    def _begin_request(self, method: bytes, version: str, *, keep_alive: bool) -> None:
        try:
            self._check_head(version)
            target = b"*" if self._url == b"*" else httptools.parse_url(self._url)
        except InferqError as error:
            self._refuse(error)
            return
        except httptools.HttpParserInvalidURLError:
            self._refuse(BadRequest("the request's target is not a URL"))
            return
        raw_path = target if isinstance(target, bytes) else target.path or b"/"
        path = raw_path.decode("latin-1")
        scope = self._scope(method.decode("ascii"), version)
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = b"" if isinstance(target, bytes) else target.query or b""
        self._take(scope, self._app, keep_alive=keep_alive and version == "1.1", to_come=self._length)

    def _check_head(self, version: str) -> None:
        """Raise what is wrong with a head that the parser took, and that a server in front may have read otherwise."""
        limits, headers = self._limits, self._headers
        if version not in ("1.1", "1.0"):
            raise VersionRefused(f"HTTP/{version} is not spoken here: use HTTP/1.1")
        if self._coding and (version == "1.0" or self._coding.strip().lower() != b"chunked"):
            raise BadRequest("the only transfer-encoding is chunked, and only in HTTP/1.1")
        if self._hosts > 1 or (version == "1.1" and not self._hosts):
            raise BadRequest("an HTTP/1.1 request has one Host header")
        if len(headers) > limits.header_count:
            raise HeadTooLarge(f"the request has more than {limits.header_count} headers")
        if self._head_bytes + self._wire_bytes > limits.head_bytes:
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in headers)
            if size > limits.head_bytes:
                raise HeadTooLarge(f"the request's headers have more than {limits.head_bytes} bytes")

    def _scope(self, method: str, version: str) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self._own,
            "client": self._peer,
            "scheme": "http",
            "method": method,
            "root_path": "",
            "headers": self._headers,
            "state": self._app_state.copy(),
        }

    def _take(self, scope: dict[str, Any], app: ASGIApp, *, keep_alive: bool, to_come: int | None) -> None:
        cycle = RequestCycle(self, scope, keep_alive=keep_alive, to_come_bytes=to_come)
        cycle.expects_continue = self._expects_continue
        self._incoming = cycle
        self._reading_head, self._head_since_s, self._idle_since_s = False, _NEVER, _NEVER
        self._wire_bytes = self._body_bytes = self._window_bytes = 0
        self._window_s = self._heard_s
        self._connections.busy(self)
        if self._active is None or self._active.response_complete:
            self._start(cycle, app)
        else:
            self._behind.append((cycle, app))

    def _start(self, cycle: RequestCycle, app: ASGIApp) -> None:
        self._active = cycle
        self._ahead_bytes = 0
        task = self._loop.create_task(cycle.run(app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _refuse(self, error: InferqError) -> None:
        """Answer what is no request, after those that came before it; then the connection ends."""
        self._headers = []
        scope = self._scope("GET", "1.1") | {"path": "", "raw_path": b"", "query_string": b""}
        self._take(scope, answer_with(error), keep_alive=False, to_come=None)
        self._deaf = True

    # How much of it, and how fast.

    def _check_framing(self) -> None:
        cycle, limits = self._incoming, self._limits
        framing = self._wire_bytes - self._body_bytes
        if cycle is None or framing <= limits.framing_bytes + limits.framing_ratio * self._body_bytes:
            return
        self._deaf = True
        cycle.refuse(
            BodyTooLarge("chunk sizes, chunk extensions or trailers are larger than the body: send it plainly")
        )
        if cycle.response_complete:
            self._linger(end=True)

    def _check_body(self, cycle: RequestCycle, now_s: float) -> None:
        if self._read_paused or cycle.expects_continue or cycle is not self._active:
            self._heard_s = self._window_s = now_s  # it is not the client who is awaited
            self._window_bytes = 0
            return
        limits = self._limits
        idle_s, rate = limits.body_idle_timeout_s, limits.min_transfer_bytes_per_s
        if now_s - self._heard_s >= idle_s:
            name = limits.setting("body_idle_timeout_ms")
            cycle.refuse(
                RequestTimeout(
                    f"nothing came of the request's body for {idle_s * 1000:g} ms{name}: send it again, without a pause"
                )
            )
        elif now_s - self._window_s >= idle_s:
            if self._window_bytes < rate * (now_s - self._window_s):
                name = limits.setting("min_transfer_bytes_per_s")
                cycle.refuse(
                    RequestTimeout(
                        f"the request's body came more slowly than {rate} bytes a second{name}: send it again, faster"
                    )
                )
            self._window_s, self._window_bytes = now_s, 0

    def _discard(self, size: int) -> None:
        self._discarded_bytes += size
        if self._discarded_bytes > self._limits.linger_bytes:
            self.drop("sends_on")

    def _stop_listening(self) -> None:
        """The answer that is under way is the last: what else was asked is not answered."""
        self._deaf = True
        self._behind.clear()
        self._incoming = self._active
        if self._active is not None:
            self._active.keep_alive = False

    # How it goes on, or ends.

    def _go_on(self, cycle: RequestCycle) -> None:
        if cycle.keep_alive and self._behind:
            self._start(*self._behind.popleft())
        elif not cycle.keep_alive or self._deaf:
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
            self._deaf = True
            if self.transport.can_write_eof():
                self.transport.write_eof()


def _address(transport: asyncio.BaseTransport, which: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(which)
    return (str(found[0]), int(found[1])) if isinstance(found, (list, tuple)) and len(found) > 1 else None
