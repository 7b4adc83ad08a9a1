"""What the simulation expects of an engine, and an engine of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from scheduling.slots import EngineLoad

from ..requests import Request


class Engine(Protocol):
    """An engine runs the requests that it is given, and queues those that it has no room for."""

    def submit(self, request: Request) -> None:
        """Run ``request``, beginning behind the tokens that it has."""

    def abort(self, request: Request, stopped: Callable[[Request], None]) -> None:
        """Stop ``request`` with the step that is under way, unless that is its last, and call ``stopped``;
        ``generated`` then says how far it came."""

    def load(self) -> EngineLoad:
        """What its metrics would say now."""


class EngineListener(Protocol):
    """Who is told what becomes of a request. The clock's time is when."""

    def started(self, request: Request) -> None:
        """It left the engine's own queue."""

    def finished(self, request: Request) -> None:
        """It has its last token. ``first_at`` says when it had its first."""

    def refused(self, request: Request) -> None:
        """It is longer than the engine's KV cache."""
