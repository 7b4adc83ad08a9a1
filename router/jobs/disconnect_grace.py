"""Streams whose client left and may come back: each is given up when its grace is over."""

from __future__ import annotations

from collections.abc import Callable

from queue_schemas import JobId
from telemetry import get_logger

MAX_AWAITED = 16_384
"""Streams that may wait for their clients; beyond it the one that has waited longest runs to its end."""
LATE_S = 1.0
"""How long after its grace a stream is given up: so long its departure may take to reach the queue."""

log = get_logger(__name__)


class DisconnectGrace:
    """The streams that nobody follows here any more. Times are the event loop's, in seconds.

    Kept in memory: a stream whose Router ends meanwhile simply runs to its end.
    """

    def __init__(self, grace_s: float, give_up: Callable[[JobId], None]) -> None:
        """``give_up`` is told of each whose grace is over; whether somebody follows it elsewhere is for it to see."""
        self._grace_s = grace_s + LATE_S
        self._give_up = give_up
        self._due: dict[JobId, float] = {}

    def __len__(self) -> int:
        return len(self._due)

    def add(self, job_id: JobId, now_s: float) -> None:
        """The client of ``job_id`` left."""
        self._due.pop(job_id, None)
        self._due[job_id] = now_s + self._grace_s
        if len(self._due) > MAX_AWAITED:
            forgotten = next(iter(self._due))
            del self._due[forgotten]
            log.warning("too_many_abandoned", job_id=forgotten, then="it runs to its end")

    def sweep(self, now_s: float) -> None:
        """Give up those whose grace is over."""
        while self._due:
            job_id, due_s = next(iter(self._due.items()))
            if due_s > now_s:
                return
            del self._due[job_id]
            self._give_up(job_id)
