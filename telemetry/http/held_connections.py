"""Answers that stay open until their client goes: so a server learns at once that a process has ended.

A killed process cannot say goodbye, but its kernel closes its connections. Who holds one open is told then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from queue_schemas import OverCapacity

BEAT_S = 15.0
"""How often a byte is sent, so that nothing between the two ends takes the connection for idle."""
LOOK_S = 0.25
"""How soon the end of the server is noticed."""
WORKERS_PRESENT = "Connections that workers hold open here: one that breaks is looked into at once"
_MOST = 10_000


class Held:
    """The held answers of one server. They end when ``ending()`` says that the server does, so that none keeps it."""

    def __init__(self, ending: Callable[[], bool]) -> None:
        self.count = 0
        self._ending = ending
        self._held: set[asyncio.Future[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    def answer(self, gone: Callable[[], Awaitable[None]]) -> Response:
        """An answer to hold; ``gone`` is called when its client ends it, not when the server does.

        Raises ``OverCapacity`` beyond ten thousand.
        """
        if self.count >= _MOST:
            raise OverCapacity(f"{_MOST} connections are held here already; try another server", retry_after_s=60)
        return _HeldAnswer(self, gone)

    async def hold(self, receive: Receive, send: Send) -> bool:
        """Until the client goes (True), or the server ends."""
        loop = asyncio.get_running_loop()
        going = loop.create_task(_until_gone(receive))
        ended: asyncio.Future[None] = loop.create_future()
        self.count += 1
        self._held.add(ended)
        if self._watch is None:
            self._watch = loop.create_task(self._let_go())
        try:
            while True:
                done, _ = await asyncio.wait({going, ended}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return going in done
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        finally:
            self.count -= 1
            self._held.discard(ended)
            going.cancel()
            if not self.count and self._watch is not None:
                self._watch.cancel()
                self._watch = None

    async def _let_go(self) -> None:
        """One look for all: each would cost what ten thousand cannot have."""
        while True:
            if self._ending():
                for ended in self._held:
                    if not ended.done():
                        ended.set_result(None)
            await asyncio.sleep(LOOK_S)


class _HeldAnswer(Response):
    def __init__(self, held: Held, gone: Callable[[], Awaitable[None]]) -> None:
        super().__init__(media_type="text/plain")
        self._held = held
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        if await self._held.hold(receive, send):
            await self._gone()
        else:
            await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
