"""Starts the requests of one connection: those that have arrived whole perhaps without a task."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from .cycle import RequestCycle, ServeDirectly


class RequestStarter:
    """Offers requests for ``app`` to ``serve_directly`` if they have arrived whole by the end of the read that brought
    their head; all others run in a task at once. ``reading``: a read is being parsed; then call :meth:`end_read`."""

    __slots__ = ("_app", "_loop", "_serve_directly", "_server", "_undecided", "reading")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, server: ServerState, app: ASGIApp, serve_directly: ServeDirectly | None
    ) -> None:
        self._loop = loop
        self._server = server
        self._app = app
        self._serve_directly = serve_directly
        self.reading = False
        self._undecided: RequestCycle | None = None

    def end_read(self) -> None:
        """All of a read was parsed: a request that has not arrived whole runs in a task."""
        self.reading = False
        cycle, self._undecided = self._undecided, None
        if cycle is not None:
            self.run(cycle, self._app)

    def start(self, cycle: RequestCycle, app: ASGIApp) -> None:
        """Have a request answered whose turn it is."""
        if app is not self._app or self._serve_directly is None:
            self.run(cycle, app)
        elif not cycle.receiving:
            self._offer(cycle, self._serve_directly)
        elif self.reading:
            self._undecided = cycle
        else:
            self.run(cycle, app)

    def arrived(self, cycle: RequestCycle) -> None:
        """A request has arrived whole."""
        cycle.tell_change()
        if cycle is self._undecided and self._serve_directly is not None:
            self._undecided = None
            self._offer(cycle, self._serve_directly)

    def run(self, cycle: RequestCycle, app: ASGIApp) -> None:
        """Have ``app`` answer a request in a task."""
        task = self._loop.create_task(cycle.run(app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _offer(self, cycle: RequestCycle, serve_directly: ServeDirectly) -> None:
        if not serve_directly(cycle):
            self.run(cycle, self._app)
