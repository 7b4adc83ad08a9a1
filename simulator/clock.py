"""The simulation's clock: events in the order of their times, and of their making where times are equal."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """``now`` is in seconds and moves from one event to the next."""

    __slots__ = ("_events", "_number", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._number = 0

    def at(self, when: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Have ``call(argument)`` called once the clock reaches ``when``."""
        self._number += 1
        heappush(self._events, (when, self._number, call, argument))

    def stop(self) -> None:
        """Nothing that is still to come happens."""
        self._events.clear()

    def run(self) -> None:
        """Call everything that is due, until nothing is left."""
        events = self._events
        while events:
            self.now, _, call, argument = heappop(events)
            call(argument)
