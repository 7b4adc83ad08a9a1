"""Decide whether the engine makes progress: a worker whose engine hangs must lose its jobs to others.

Rules:

* Without running jobs there is nothing to lose: the leases are kept.
* Progress is the engine's: output that arrived here, or health answered in time while its counters move.
* Without progress, and also without an answer, the engine is believed for a while: a long prompt takes its time, and a
  busy server may be late with its pages. When that time is over, its jobs are lost.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineProgress:
    """The evidence so far. Times are seconds of one monotonic clock."""

    stall_timeout_s: float
    _output_count: int = -1
    _engine_counter: int | None = None
    _moved_at: float | None = None

    def shown_by_output(self, running: int, output_count: int, now: float) -> bool:
        """Whether progress is proven without asking the engine. ``output_count``: pieces that arrived here so far."""
        if running and output_count == self._output_count:
            return False
        self._output_count = output_count
        self._moved_at = now
        return True

    def believed(self, engine_counter: int | None, now: float) -> bool:
        """Whether the engine counts as well. It was asked: ``engine_counter`` is its own counter, None if it did not
        answer in time."""
        moved = engine_counter is not None and engine_counter != self._engine_counter
        if moved:
            self._engine_counter = engine_counter
        if moved or self._moved_at is None:
            self._moved_at = now
        return now - self._moved_at < self.stall_timeout_s
