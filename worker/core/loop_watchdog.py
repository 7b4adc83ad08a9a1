"""Decide whether a worker may keep its leases: while its engine makes progress, and its event loop turns.

Rules:

* The loop that serves jobs notes whether the engine makes progress (:mod:`worker.core.engine_progress`), and that it
  turns itself.
* A loop that stood still for longer than its own limit serves nobody, whatever it noted last: the leases are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

LATE_S = 0.3
"""A serving loop ticks each quarter of a second. One that is later cannot answer a ping."""


@dataclass(slots=True)
class LoopWatchdog:
    """What the serving loop notes for the thread that renews: each field is written by the loop alone, in one store.
    ``engine_alive``: whether :class:`~worker.core.EngineProgress` says that the leases may be kept."""

    ticked_at: float
    loop_stall_timeout_s: float
    engine_alive: bool = True

    def may_renew(self, now: float) -> bool:
        """Whether the leases may be kept now."""
        return self.engine_alive and not self.stuck(now)

    def stuck(self, now: float) -> bool:
        """Whether the serving loop stood still for too long."""
        return now - self.ticked_at >= self.loop_stall_timeout_s

    def late(self, now: float) -> bool:
        """Whether the serving loop is too busy now to see a ping."""
        return now - self.ticked_at >= LATE_S
