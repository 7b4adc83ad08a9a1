"""Watches a client's connection: reports that the client disconnected, and drops it on demand.

Our own server's connection calls back. Under any other server a task waits for the disconnect that ASGI's ``receive``
reports.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from starlette.types import Receive

from telemetry.http.connections import RequestCycle


class Connection:
    """Watches one client from :meth:`watch` to :meth:`unwatch`; ``on_disconnect`` is called at most once."""

    __slots__ = ("_cycle", "_on_disconnect", "_receive", "_request", "_task")

    def __init__(self, receive: Receive, cycle: RequestCycle | None = None) -> None:
        """``cycle``: the server's side of ``receive``, if it is known."""
        self._receive = receive
        self._cycle = cycle or _cycle(receive)
        self._request: asyncio.Task[Any] | None = None
        self._on_disconnect: Callable[[str], None] | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, on_disconnect: Callable[[str], None]) -> None:
        """Start watching. The request's body must have been read."""
        if self._cycle is not None:
            self._cycle.watch(on_disconnect)
            return
        self._on_disconnect = on_disconnect
        self._request = asyncio.current_task()
        self._task = asyncio.create_task(self._wait())

    def unwatch(self) -> None:
        """Stop, before the last piece of the response is sent: after it the server always reports a disconnect."""
        self._on_disconnect = None
        if self._cycle is not None:
            self._cycle.watch(None)
        if self._task is not None:
            self._task.cancel()

    async def closed(self) -> None:
        """After :meth:`unwatch`: wait until the watching task has ended."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def disconnect(self) -> None:
        """Drop the connection at once, with what the client has not read."""
        if self._cycle is not None:
            self._cycle.cut()
        elif self._request is not None:
            self._request.cancel()

    async def _wait(self) -> None:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        on_disconnect, self._on_disconnect = self._on_disconnect, None
        if on_disconnect is not None:
            on_disconnect(message.get("why", "left"))


def _cycle(receive: Receive) -> RequestCycle | None:
    """The server's side of ``receive``: ASGI has no way to drop a client that does not read."""
    cycle = getattr(inspect.unwrap(receive), "__self__", None)
    return cycle if isinstance(cycle, RequestCycle) else None
