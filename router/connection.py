"""The client's connection: noticing that it is gone, and cutting it.

Under uvicorn both cost no task: the ``receive`` coroutine that reports a disconnect is stepped by the future it waits
for. Other servers get a task for each request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Message, Receive
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from telemetry import get_logger

log = get_logger(__name__)


class Connection:
    """Watches one client from :meth:`watch` to :meth:`unwatch`; ``on_gone`` is called at most once."""

    __slots__ = ("_awaited", "_on_gone", "_receive", "_request", "_steps", "_task")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._request: asyncio.Task[Any] | None = None
        self._on_gone: Callable[[], None] | None = None
        self._steps: Coroutine[Any, Any, Message] | None = None
        self._awaited: asyncio.Future[Any] | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Begin. The request's body must have been read."""
        self._on_gone = on_gone
        if _cycle(self._receive) is not None:
            self._step(None)
        else:
            self._request = asyncio.current_task()
            self._task = asyncio.create_task(self._wait())

    def unwatch(self) -> None:
        """End, before the last of the answer is sent: from then on the server reports a disconnect in any case."""
        self._on_gone = None
        if self._awaited is not None:
            self._awaited.remove_done_callback(self._step)
            self._awaited = None
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        if self._task is not None:
            self._task.cancel()

    async def closed(self) -> None:
        """After :meth:`unwatch`: nothing of the watch is left running."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def cut(self) -> None:
        """Drop the connection at once, with what the client has not read."""
        cycle = _cycle(self._receive)
        if cycle is not None:
            cycle.transport.abort()
        elif self._request is not None:
            self._request.cancel()

    def _step(self, _done: asyncio.Future[Any] | None) -> None:
        """Run ``receive()`` up to its next wait, as a task would, and come back when that is over."""
        self._awaited = None
        while self._on_gone is not None:
            if self._steps is None:
                self._steps = self._receive()  # type: ignore[assignment] # uvicorn's is a coroutine
            try:
                awaited = self._steps.send(None)  # type: ignore[union-attr]
            except StopIteration as returned:
                self._steps = None
                if returned.value["type"] == "http.disconnect":
                    self._gone()
                continue
            awaited._asyncio_future_blocking = False  # how a task acknowledges the wait
            awaited.add_done_callback(self._step)
            self._awaited = awaited
            return

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone()

    def _gone(self) -> None:
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone()


def _cycle(receive: Receive) -> RequestResponseCycle | None:
    owner = getattr(receive, "__self__", None)
    return owner if isinstance(owner, RequestResponseCycle) else None
