"""Tells the queue about jobs that no request waits for any more: one task with a bounded backlog.

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

MAX_BACKLOG = 16_384
MAX_CONCURRENCY = 64

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _CancelCommand:
    """Cancel a job for ``reason``, or with ``listener`` detach that listener from it.

    ``if_orphaned``: only if the job is not persisted. ``abandoned_ms``: only if no Router has listened to it for so
    long.
    """

    job_id: JobId
    reason: str = ""
    if_orphaned: bool = False
    listener: SessionId | None = None
    abandoned_ms: int = 0
    used: int = 0


class Canceller:
    """Cancels jobs and detaches from them, soon and in the background.

    If that fails, or the backlog is full, a job's deadline ends it, and what a job still sends here is dropped.
    """

    def __init__(self, queue: Callable[[], QueuePort | None], followers: Followers) -> None:
        """``followers``: the requests here that wait for persisted jobs, perhaps again."""
        self._queue = queue
        self._followers = followers
        self._backlog: asyncio.Queue[_CancelCommand] = asyncio.Queue(MAX_BACKLOG)

    def cancel(self, job_id: JobId, reason: str, used: int = 0) -> None:
        """Cancel ``job_id`` soon. ``used``: what was delivered of its answer has cost."""
        self._put(_CancelCommand(job_id, reason, used=used))

    def detach(self, job_id: JobId, listener: SessionId) -> None:
        """Remove ``listener`` from the persisted job ``job_id`` soon, unless a request here waits for it then."""
        self._put(_CancelCommand(job_id, listener=listener))

    def cancel_abandoned(self, job_id: JobId, reason: str, after_ms: int) -> None:
        """Cancel the persisted job ``job_id`` soon if no Router has listened to it for ``after_ms``."""
        self._put(_CancelCommand(job_id, reason, abandoned_ms=after_ms))

    def cancel_orphan(self, job_id: JobId) -> None:
        """Cancel ``job_id``, which no request here waits for, soon and unless it is persisted: another Router's may."""
        self._put(_CancelCommand(job_id, "nobody waits for the answer", if_orphaned=True))

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = [await self._backlog.get()]
            while len(batch) < MAX_CONCURRENCY and not self._backlog.empty():
                batch.append(self._backlog.get_nowait())
            await asyncio.gather(*map(self._send, batch))
            for _ in batch:
                self._backlog.task_done()

    async def settled(self) -> None:
        """Return once the backlog is empty."""
        await self._backlog.join()

    def _put(self, command: _CancelCommand) -> None:
        try:
            self._backlog.put_nowait(command)
        except asyncio.QueueFull:
            log.warning("cancel_backlog_full", job_id=command.job_id)

    async def _send(self, command: _CancelCommand) -> None:
        queue, job_id = self._queue(), command.job_id
        if queue is None:
            log.warning("job_not_cancelled", job_id=job_id, error="the queue is not connected")
            return
        try:
            if command.abandoned_ms:
                if job_id not in self._followers:
                    await queue.jobs.cancel_abandoned(job_id, command.reason, command.abandoned_ms)
            elif command.listener is None:
                await queue.jobs.cancel(job_id, command.reason, if_orphaned=command.if_orphaned, used=command.used)
            elif job_id not in self._followers:
                try:
                    await queue.output.detach(job_id, command.listener)
                finally:  # a request that came meanwhile may have attached before this
                    self._followers.recheck(job_id)
        except InferqError as error:
            log.warning("job_not_cancelled", job_id=job_id, error=error.message)
