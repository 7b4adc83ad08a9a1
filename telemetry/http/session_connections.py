"""Session connections: responses that stay open while their client's process lives, so that a server learns of its end.

A killed process cannot sign off, but its kernel closes its connections, and the server that holds one is notified.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from queue_schemas import OverCapacity

BEAT_S = 15.0
"""How often a byte is sent, so that no proxy in between closes the connection as idle."""
STOP_CHECK_S = 0.25
"""How soon a stopping server ends its session connections."""
OPEN_SESSIONS = "Connections that worker sessions hold open here; when one breaks, the session is checked at once"
_MAX_CONNECTIONS = 10_000


class SessionConnections:
    """The session connections of one server. They end when ``stopping()`` is true: none delays the server's end."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.count = 0
        self._stopping = stopping
        self._open: set[asyncio.Future[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    def answer(self, lost: Callable[[], Awaitable[None]]) -> Response:
        """A response that stays open; ``lost`` is called when the client ends it, not when the server stops.

        Raises ``OverCapacity`` beyond ten thousand.
        """
        if self.count >= _MAX_CONNECTIONS:
            raise OverCapacity(
                f"{_MAX_CONNECTIONS} connections are held here already; try another server", retry_after_s=60
            )
        return _SessionResponse(self, lost)

    async def hold(self, receive: Receive, send: Send) -> bool:
        """Keep one open until its client disconnects (True) or the server stops (False)."""
        loop = asyncio.get_running_loop()
        disconnecting = loop.create_task(_disconnected(receive))
        ended: asyncio.Future[None] = loop.create_future()
        self.count += 1
        self._open.add(ended)
        if self._watch is None:
            self._watch = loop.create_task(self._end_when_stopping())
        try:
            while True:
                done, _ = await asyncio.wait(
                    {disconnecting, ended}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    return disconnecting in done
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        finally:
            self.count -= 1
            self._open.discard(ended)
            disconnecting.cancel()
            if not self.count and self._watch is not None:
                self._watch.cancel()
                self._watch = None

    async def _end_when_stopping(self) -> None:
        """One check for all: ten thousand timers would cost too much."""
        while True:
            if self._stopping():
                for ended in self._open:
                    if not ended.done():
                        ended.set_result(None)
            await asyncio.sleep(STOP_CHECK_S)


class _SessionResponse(Response):
    def __init__(self, connections: SessionConnections, lost: Callable[[], Awaitable[None]]) -> None:
        super().__init__(media_type="text/plain")
        self._connections = connections
        self._lost = lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        if await self._connections.hold(receive, send):
            await self._lost()
        else:
            await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
