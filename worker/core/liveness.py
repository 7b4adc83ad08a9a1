"""Whether a worker may keep its leases: a worker whose engine hangs must lose its jobs to others.

Rules:

* Without running jobs there is nothing to lose: renew.
* Output is the proof of life: bytes that arrived here, or a counter of the engine's that moved.
* An engine that answers but produces nothing is believed for a while (a long prompt takes its time), an engine that
  does not answer is not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Liveness:
    """The evidence so far. Times are seconds of one monotonic clock."""

    stall_limit_s: float
    _seen: int = -1
    _engine: int | None = None
    _moved_at: float | None = None

    def moved(self, running: int, seen: int, now: float) -> bool:
        """Whether output is proven without asking the engine. ``seen`` counts what arrived here so far."""
        if running and seen == self._seen:
            return False
        self._seen = seen
        self._moved_at = now
        return True

    def believes(self, engine: int | None, now: float) -> bool:
        """The engine was asked: ``engine`` is its own counter, None if it did not answer."""
        if engine is None:
            return False
        if engine != self._engine or self._moved_at is None:
            self._engine = engine
            self._moved_at = now
        return now - self._moved_at < self.stall_limit_s
