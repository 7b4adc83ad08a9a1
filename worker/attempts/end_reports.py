"""Report to the queue how attempts ended, until it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from queue_schemas import InferqError, Settled
from telemetry import get_logger

from ..metrics import WorkerMetrics
from ..queue import Queue
from .attempt import Attempt, Release, Settle, Yield, log_fields

_RETRY_PAUSE_S = 1.0
_T = TypeVar("_T")

log = get_logger(__name__)


class EndReports:
    """Settles, releases and reports crashes, and counts how attempts ended.

    Each report is repeated until the queue answers or the job's deadline passes: an answer is worth the wait for Redis,
    and a live worker renews a lease that is not ended. Repeats are safe: the queue's fence passes only the first.
    """

    def __init__(self, queue: Queue, metrics: WorkerMetrics) -> None:
        self._queue = queue
        self._metrics = metrics

    async def settle(self, attempt: Attempt, ending: Settle) -> None:
        """The job has its answer."""
        lease = attempt.lease
        run_ms = round((asyncio.get_running_loop().time() - attempt.started) * 1000)
        answer = await self._until_answered(
            lambda: self._queue.attempts.settle(lease, ending.outcome, ending.frames, used=ending.used, run_ms=run_ms),
            "settle_failed",
            attempt,
        )
        if answer is None:
            return
        self._metrics.settled(answer)
        self._metrics.ended(lease.job.model, ending.outcome.value)
        if answer is not Settled.OK:
            log.info("answer_dropped", answer=answer.value, **log_fields(lease))

    async def release(self, attempt: Attempt, ending: Release) -> None:
        """The job is to run again."""
        lease = attempt.lease
        avoid_ms = round(ending.wait_s * 1000)
        answer = await self._until_answered(
            lambda: self._queue.attempts.release(lease, ending.reason, counted=ending.counted, avoid_ms=avoid_ms),
            "release_failed",
            attempt,
        )
        if answer is None:
            return
        self._metrics.settled(answer)
        self._metrics.ended(lease.job.model, "spent" if ending.counted else "handed_back")
        log.info("job_released", reason=ending.reason, counted=ending.counted, answer=answer.value, **log_fields(lease))

    async def yielded(self, attempt: Attempt, ending: Yield) -> None:
        """The job goes on later behind what it said."""
        lease = attempt.lease
        answer = await self._until_answered(
            lambda: self._queue.attempts.release_yielded(lease, ending.reason, ending.following),
            "yield_failed",
            attempt,
        )
        if answer is None:
            return
        self._metrics.settled(answer)
        self._metrics.ended(lease.job.model, "yielded")
        log.info("job_yielded", answer=answer.value, **log_fields(lease))

    async def crashed(self, attempts: Sequence[Attempt], reason: str) -> None:
        """The engine crashed under all of ``attempts``."""
        last = max(attempts, key=lambda attempt: attempt.deadline)
        leases = [attempt.lease for attempt in attempts]
        answers = await self._until_answered(
            lambda: self._queue.attempts.report_crash(leases, reason), "crash_report_failed", last
        )
        for lease, answer in zip(leases, answers or (), strict=False):
            self._metrics.settled(answer)
            self._metrics.ended(lease.job.model, "spent")
            log.info("job_crashed", reason=reason, answer=answer.value, suspect=lease.suspect, **log_fields(lease))

    async def _until_answered(self, send: Callable[[], Awaitable[_T]], failure: str, attempt: Attempt) -> _T | None:
        """The queue's answer; None if the job's time ran out before it came. ``failure``: the log event of a try."""
        while True:
            try:
                answer = await send()
            except InferqError as error:
                log.error(failure, error=error.message, **log_fields(attempt.lease))
            else:
                return answer
            if asyncio.get_running_loop().time() >= attempt.deadline:
                return None
            await asyncio.sleep(_RETRY_PAUSE_S)
