"""Delivery jobs of the notifier on RQ: one runs at a time, however many notifiers there are.

A job starts the attempts that are due and does not wait for slow receivers. A job that is lost in Redis is replaced by
the scan, which finds in the file store what is due.
"""

from __future__ import annotations

import asyncio
import secrets
import time

from broker.rq.handler import JobHandler
from broker.rq.queues import RqConnection, RqJob, RqQueue
from queue_schemas import InferqError
from telemetry import get_logger
from telemetry.threads import in_thread

from .dispatcher import Dispatcher

WEBHOOKS_QUEUE = "inferq-webhooks"
JOB_S = 2.0
"""How long a job starts attempts while there are more."""
_LOCK = "webhooks"

log = get_logger(__name__)

delivery_jobs = JobHandler(
    "webhooks are sent by `inferq notifier` (python -m webhooks.service), not by `rq worker`", limit_s=60.0
)


def deliver() -> str:
    """The function of a delivery job; what it did, for people. Blocks."""
    return delivery_jobs.call()


class DeliveryJob(RqJob):
    """Starts the attempts that are due."""

    runs = "webhooks.rq_jobs.deliver"


class DeliveryQueue(RqQueue):
    """The delivery jobs that wait: at most one, except after a harmless race."""

    def __init__(self, connection: RqConnection, lock_ttl_ms: int) -> None:
        """A job whose process died counts as ended after ``lock_ttl_ms``."""
        super().__init__(connection, WEBHOOKS_QUEUE, DeliveryJob)
        self._lock_ms = lock_ttl_ms

    def put(self) -> None:
        """Enqueue a job, unless one waits or runs."""
        if not self.waiting_count() and not self.is_locked(_LOCK):
            self.enqueue(f"webhooks-{time.time_ns()}", "deliver the webhooks that are due")

    def begin(self, token: str) -> bool:
        """Whether the job may run: no other does."""
        return self.lock(_LOCK, token, self._lock_ms)

    def end(self, token: str) -> None:
        self.unlock(_LOCK, token)


class DeliveryJobs:
    """Runs delivery jobs on an event loop, and enqueues the next one while deliveries are due."""

    def __init__(self, dispatcher: Dispatcher, queue: DeliveryQueue) -> None:
        self._dispatcher = dispatcher
        self._queue = queue
        self.fault = ""
        """Why the last job or scan failed; empty if it succeeded."""

    async def run(self) -> str:
        """Run one job; what it did, for people. After a failure the scan tries again."""
        token = secrets.token_hex(8)
        try:
            if not await in_thread(lambda: self._queue.begin(token)):
                return "another delivery job runs"
            try:
                started = await self._dispatcher.deliver(JOB_S)
            finally:
                await in_thread(lambda: self._queue.end(token))
            self.fault = ""
            if self._dispatcher.has_due:
                await in_thread(self._queue.put)
        except InferqError as error:
            self.fault = error.message
            log.warning("webhook_job_failed", error=error.message, then="the next scan tries again")
            return error.message
        return f"{started} attempts started"

    async def scan(self, every_s: float) -> None:
        """Enqueue a job whenever a delivery is due, until cancelled."""
        while True:
            try:
                await self._dispatcher.find_pending()
                if self._dispatcher.has_due:
                    await in_thread(self._queue.put)
                self.fault = ""
            except InferqError as error:
                if error.message != self.fault:
                    log.warning("webhook_scan_failed", error=error.message)
                self.fault = error.message
            await asyncio.sleep(every_s)
