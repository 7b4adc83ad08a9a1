"""Whether a worker may keep its leases: a worker whose engine hangs must lose its jobs to others.

Rules:

* Without running jobs there is nothing to lose: renew.
* Progress is the engine's: bytes that arrived here, or health answered in time while its counters move.
* Without progress, and also without an answer, it is believed for a while: a long prompt takes its time, and a busy
  server may be late with its pages. What it holds is lost when that is over.
* The loop that serves jobs says all this, and that it turns. One that stood still for longer than its own limit serves
  nobody, whatever was found last.
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
        """The engine was asked: ``engine`` is its own counter, None if it did not answer in time."""
        answered = engine is not None and engine != self._engine
        if answered:
            self._engine = engine
        if answered or self._moved_at is None:
            self._moved_at = now
        return now - self._moved_at < self.stall_limit_s


LATE_S = 0.3
"""A serving loop ticks each quarter of a second. One that is later cannot answer a ping."""


@dataclass(slots=True)
class LoopWatchdog:
    """What the serving loop tells whoever renews for it, in another thread: each field is written by the loop alone, in
    one store. ``engine_alive``: whether :class:`Liveness` says that the leases may be kept."""

    ticked_at: float
    loop_limit_s: float
    engine_alive: bool = True

    def may_renew(self, now: float) -> bool:
        """Whether the leases may be kept now."""
        return self.engine_alive and not self.stuck(now)

    def stuck(self, now: float) -> bool:
        """Whether the serving loop stood still for too long."""
        return now - self.ticked_at >= self.loop_limit_s

    def late(self, now: float) -> bool:
        """Whether the serving loop is too busy now to see a ping."""
        return now - self.ticked_at >= LATE_S
