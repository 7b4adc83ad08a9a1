"""Which streams an engine has forgotten while it serves others: each of those is given up alone.

Rules:

* A stream that has begun is stuck when nothing came of it for the whole limit, and something came of others at the end
  of it. That its engine's counters move proves nothing: they may count this very stream, whose words a parser holds
  back.
* Time in which this worker did not read (its Router is slow), or nobody looked (its process, perhaps with the engine,
  was stopped), is not the engine's silence.
* What has not begun, plain answers above all, says nothing until its end: only its deadline ends it, or the stall of
  the whole engine (:mod:`worker.core.liveness`).
"""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST_GAP, _LEAST_GAP_S = 1 / 3, 1.0
"""Part of the limit that may pass between two looks (always a second: a busy loop is late); after a longer one nothing
is known of the time between."""


@dataclass(slots=True)
class Silence:
    """One stream. ``pieces`` counts what came of it and ``reading`` says whether somebody waits for more: both are
    written where the stream is read, and looked at from time to time."""

    pieces: int = 0
    reading: bool = False
    _counted: int = -1
    _since: float = 0.0
    _looked: float = 0.0

    def is_stuck(self, now: float, others_at: float, limit_s: float) -> bool:
        """Look at ``now`` (s); ``others_at`` is when anything last came of any stream or answer of this worker."""
        unseen = now - self._looked > max(limit_s * _LONGEST_GAP, _LEAST_GAP_S)
        self._looked = now
        if self.pieces != self._counted or not self.reading or unseen:
            self._counted = self.pieces
            self._since = now
        return self.pieces > 0 and others_at - self._since >= limit_s
