"""The client's connection: noticing that it is gone, and cutting it.

One task per request waits for the disconnect that ASGI's ``receive`` reports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Connection:
    """Watches one client from :meth:`watch` to :meth:`unwatch`; ``on_gone`` is called at most once."""

    __slots__ = ("_on_gone", "_receive", "_request", "_task")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._request: asyncio.Task[Any] | None = None
        self._on_gone: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Begin. The request's body must have been read."""
        self._on_gone = on_gone
        self._request = asyncio.current_task()
        self._task = asyncio.create_task(self._wait())

    def unwatch(self) -> None:
        """End, before the last of the answer is sent: from then on the server reports a disconnect in any case."""
        self._on_gone = None
        if self._task is not None:
            self._task.cancel()

    async def closed(self) -> None:
        """After :meth:`unwatch`: nothing of the watch is left running."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def cut(self) -> None:
        """Drop the connection at once, with what the client has not read."""
        transport = _transport(self._receive)
        if transport is not None:
            transport.abort()
        elif self._request is not None:
            self._request.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone()


def _transport(receive: Receive) -> asyncio.Transport | None:
    """The connection below uvicorn's ``receive``: ASGI has no way to drop a client that does not read."""
    cycle = getattr(getattr(receive, "__wrapped__", receive), "__self__", None)
    return cycle.transport if isinstance(cycle, RequestResponseCycle) else None
