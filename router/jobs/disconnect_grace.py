"""Cancels resumable streams whose client left and did not come back within the grace period."""

from __future__ import annotations

from collections.abc import Callable

from queue_schemas import JobId
from telemetry import get_logger

MAX_AWAITED = 16_384
"""Streams that may wait for their clients; beyond it the oldest runs to its end."""
LATE_S = 1.0
"""How long after its grace a stream is cancelled: the client's departure may take so long to reach the queue."""

log = get_logger(__name__)


class DisconnectGrace:
    """The streams that no request here waits for any more. Times are the event loop's, in seconds.

    Kept in memory: a stream whose Router ends meanwhile runs to its end.
    """

    def __init__(self, grace_ms: int, cancel_abandoned: Callable[[JobId, str, int], None]) -> None:
        """``cancel_abandoned(job_id, reason, after_ms)`` cancels a job unless some Router followed it within
        ``after_ms``."""
        self._grace_ms = grace_ms
        self._cancel_abandoned = cancel_abandoned
        self._due: dict[JobId, float] = {}

    def __len__(self) -> int:
        return len(self._due)

    def add(self, job_id: JobId, now_s: float) -> None:
        """Start the grace of ``job_id``: its client left."""
        self._due.pop(job_id, None)
        self._due[job_id] = now_s + self._grace_ms / 1000 + LATE_S
        if len(self._due) > MAX_AWAITED:
            oldest = next(iter(self._due))
            del self._due[oldest]
            log.warning("too_many_disconnected_streams", job_id=oldest, then="it runs to its end")

    def sweep(self, now_s: float) -> None:
        """Cancel those whose grace is over."""
        while self._due:
            job_id, due_s = next(iter(self._due.items()))
            if due_s > now_s:
                return
            del self._due[job_id]
            reason = f"its client was away for more than {self._grace_ms} ms"
            self._cancel_abandoned(job_id, reason, self._grace_ms)
