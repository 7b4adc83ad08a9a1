"""A small app on a real server, for tests of connections with raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from queue_schemas import InferqError
from telemetry.http.connections import ConnectionLimits
from telemetry.http.server import bind_socket, run_server

LARGE = b"x" * 20_000_000


@dataclass
class EchoApp:
    """``/echo`` answers with the body, ``/ignore`` at once without reading it, ``/large`` with 20 MB, ``/stream`` in
    pieces without a length, ``/wait`` when :attr:`go` is set, unless the client goes before."""

    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Method, path and body of each request that was read."""
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    open: int = 0
    gone: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.open += 1
        try:
            await self._answer(scope, receive, send)
        except InferqError as error:
            await _say(send, error.body(), error.status)
        finally:
            self.open -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.headers.append(dict(scope["headers"]))
        if path == "/ignore":
            await _say(send, b"no", 401)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.seen.append((scope["method"], path, body))
        if path == "/wait" and not await self._waited(receive):
            self.gone += 1
        elif path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for piece in (b"one", b"two", b"three"):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        elif path == "/broken":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise RuntimeError("as a test wants it")
        else:
            await _say(send, LARGE if path == "/large" else body)

    async def _waited(self, receive: Receive) -> bool:
        leaving, going = asyncio.ensure_future(receive()), asyncio.ensure_future(self.go.wait())
        await asyncio.wait((leaving, going), return_when=asyncio.FIRST_COMPLETED)
        waited = going.done()
        leaving.cancel()
        going.cancel()
        return waited


async def _say(send: Send, body: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: ASGIApp, limits: ConnectionLimits | None = None) -> AsyncIterator[int]:
    """The port on which ``app`` is served."""
    stop = asyncio.Event()
    with bind_socket("127.0.0.1", 0) as listener:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run_server(app, sock=listener, stop=stop, shutdown_timeout_s=1.0, limits=limits))
            try:
                yield listener.getsockname()[1]
            finally:
                stop.set()


def post(path: str, body: bytes = b"", *headers: str, version: str = "1.1") -> bytes:
    """A request with a body of known length."""
    lines = [f"POST {path} HTTP/{version}", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(path: str, *headers: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Transfer-Encoding: chunked", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
