"""Cancelling jobs nobody waits for any more: one task, one bounded line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from queue_schemas import InferqError, JobId
from telemetry import get_logger

from .ports import QueuePort

LINE = 16_384
AT_ONCE = 64

log = get_logger(__name__)


class Canceller:
    """Cancels jobs on the queue. A job whose cancelling fails, or finds the line full, is ended by its deadline."""

    def __init__(self, queue: Callable[[], QueuePort | None]) -> None:
        self._queue = queue
        self._line: asyncio.Queue[tuple[JobId, str]] = asyncio.Queue(LINE)

    def cancel(self, job_id: JobId, reason: str) -> None:
        """Have ``job_id`` cancelled soon."""
        try:
            self._line.put_nowait((job_id, reason))
        except asyncio.QueueFull:
            log.warning("cancel_line_full", job_id=job_id)

    async def run(self) -> None:
        """Cancel until cancelled."""
        while True:
            batch = [await self._line.get()]
            while len(batch) < AT_ONCE and not self._line.empty():
                batch.append(self._line.get_nowait())
            await asyncio.gather(*(self._cancel_one(job_id, reason) for job_id, reason in batch))
            for _ in batch:
                self._line.task_done()

    async def settled(self) -> None:
        """When everything in the line has been dealt with."""
        await self._line.join()

    async def _cancel_one(self, job_id: JobId, reason: str) -> None:
        queue = self._queue()
        if queue is None:
            log.warning("job_not_cancelled", job_id=job_id, error="the queue is not connected")
            return
        try:
            await queue.cancel(job_id, reason)
        except InferqError as error:
            log.warning("job_not_cancelled", job_id=job_id, error=error.message)
