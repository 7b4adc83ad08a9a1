"""Letting go of jobs nobody waits for here any more: one task, one bounded line.

An ordinary job is cancelled. A persisted one runs on, and this Router is sent nothing more of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from queue_schemas import InferqError, JobId, SessionId
from telemetry import get_logger

from ..ports import QueuePort
from .followers import Followers

LINE = 16_384
AT_ONCE = 64

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _CancelCommand:
    """``reason`` is why the job is cancelled, ``if_orphaned`` if nobody asked for it here; ``listener`` is who detaches
    from it. ``abandoned_ms``: it is cancelled only if no Router has listened to it for so long."""

    job_id: JobId
    reason: str = ""
    if_orphaned: bool = False
    listener: SessionId | None = None
    abandoned_ms: int = 0


class Canceller:
    """Lets go of jobs on the queue. One whose cancelling fails, or finds the line full, is ended by its deadline; one
    that is not detached from sends what nobody reads."""

    def __init__(self, queue: Callable[[], QueuePort | None], followers: Followers) -> None:
        """``followers``: who follows persisted jobs here, perhaps again."""
        self._queue = queue
        self._followers = followers
        self._line: asyncio.Queue[_CancelCommand] = asyncio.Queue(LINE)

    def cancel(self, job_id: JobId, reason: str, *, if_orphaned: bool = False) -> None:
        """Have ``job_id`` cancelled soon; ``if_orphaned``: unless it is stored, for who knows who asked for it."""
        self._put(_CancelCommand(job_id, reason, if_orphaned))

    def detach(self, job_id: JobId, listener: SessionId) -> None:
        """Have ``listener`` forgotten by the persisted job ``job_id``, soon and unless somebody follows it then."""
        self._put(_CancelCommand(job_id, listener=listener))

    def cancel_abandoned(self, job_id: JobId, reason: str, after_ms: int) -> None:
        """Have the persisted job ``job_id`` cancelled soon if nobody, here or elsewhere, has followed it for so
        long."""
        self._put(_CancelCommand(job_id, reason, abandoned_ms=after_ms))

    def cancel_orphan(self, job_id: JobId) -> None:
        """Have ``job_id`` cancelled soon unless it is persisted: no request waits for it."""
        self.cancel(job_id, "nobody waits for the answer", if_orphaned=True)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = [await self._line.get()]
            while len(batch) < AT_ONCE and not self._line.empty():
                batch.append(self._line.get_nowait())
            await asyncio.gather(*map(self._let_go, batch))
            for _ in batch:
                self._line.task_done()

    async def settled(self) -> None:
        """When everything in the line has been dealt with."""
        await self._line.join()

    def _put(self, farewell: _CancelCommand) -> None:
        try:
            self._line.put_nowait(farewell)
        except asyncio.QueueFull:
            log.warning("cancel_line_full", job_id=farewell.job_id)

    async def _let_go(self, farewell: _CancelCommand) -> None:
        queue, job_id = self._queue(), farewell.job_id
        if queue is None:
            log.warning("job_not_cancelled", job_id=job_id, error="the queue is not connected")
            return
        try:
            if farewell.abandoned_ms:
                if job_id not in self._followers:
                    await queue.jobs.cancel_abandoned(job_id, farewell.reason, farewell.abandoned_ms)
            elif farewell.listener is None:
                await queue.jobs.cancel(job_id, farewell.reason, if_orphaned=farewell.if_orphaned)
            elif job_id not in self._followers:
                try:
                    await queue.output.detach(job_id, farewell.listener)
                finally:  # who came meanwhile may have been attached before that
                    self._followers.look_again(job_id)
        except InferqError as error:
            log.warning("job_not_cancelled", job_id=job_id, error=error.message)
