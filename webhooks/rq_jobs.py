"""RQ's side of webhooks: rounds of deliveries on a queue of their own, one at a time whoever runs it.

A round begins what is due and does not wait for slow receivers. What is lost here is put back by the scan, which finds
in the store what is due.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import redis

from broker.rq.queues import OwnJob, OwnQueue
from queue_schemas import BrokerUnavailable, CannotStart, InferqError
from telemetry import get_logger

from .dispatcher import Dispatcher

WEBHOOKS_QUEUE = "inferq-webhooks"
ROUND_S = 2.0
"""How long a round takes while there is more to do."""
_LOCK = "webhooks"
_ROUND_LIMIT_S = 60.0

log = get_logger(__name__)


class RqJob(OwnJob):
    """One round."""

    runs = "webhooks.rq_jobs.deliver"


class RqJobQueue(OwnQueue):
    """The rounds that wait: one at most, but for a race that does no harm."""

    def __init__(self, connection: redis.Redis, lock_ms: int) -> None:
        """``lock_ms`` from its beginning, a round counts as over."""
        super().__init__(connection, WEBHOOKS_QUEUE, RqJob)
        self._lock_ms = lock_ms

    def put(self) -> None:
        """Put a round on the queue, unless one waits there or runs."""
        if not self.others_wait() and not self.locked(_LOCK):
            self.enqueue(f"webhooks-{time.time_ns()}", "deliver the webhooks that are due")

    def begin(self, token: str) -> bool:
        """Begin a round, unless one runs."""
        return self.lock(_LOCK, token, self._lock_ms)

    def end(self, token: str) -> None:
        self.unlock(_LOCK, token)


class RqJobs:
    """Runs rounds in an event loop, and puts the next one on the queue where there is more to do."""

    def __init__(self, dispatcher: Dispatcher, queue: RqJobQueue) -> None:
        self._dispatcher = dispatcher
        self._queue = queue
        self.fault = ""
        """Why the last one could not be done; empty: it could."""

    async def run(self) -> str:
        """One round; what was done, for people. What fails here is tried again by the scan."""
        token = secrets.token_hex(8)
        try:
            if not await asyncio.to_thread(self._queue.begin, token):
                return "another round runs"
            try:
                begun = await self._dispatcher.deliver(ROUND_S)
            finally:
                await asyncio.to_thread(self._queue.end, token)
            self.fault = ""
            if self._dispatcher.due:
                await asyncio.to_thread(self._queue.put)
        except InferqError as error:
            self.fault = error.message
            log.warning("webhook_round_failed", error=error.message, then="the next scan tries again")
            return error.message
        return f"{begun} attempts begun"

    async def scan(self, every_s: float) -> None:
        """Put a round on the queue whenever something is due, until cancelled."""
        while True:
            try:
                await self._dispatcher.look()
                if self._dispatcher.due:
                    await asyncio.to_thread(self._queue.put)
                self.fault = ""
            except InferqError as error:
                if error.message != self.fault:
                    log.warning("webhook_scan_failed", error=error.message)
                self.fault = error.message
            await asyncio.sleep(every_s)


@dataclass(frozen=True, slots=True)
class _Process:
    rounds: RqJobs
    loop: asyncio.AbstractEventLoop


_process: list[_Process] = []


def serve_rounds(rounds: RqJobs | None) -> None:
    """From now on the jobs of this process run on ``rounds``, in the event loop that calls this; None: on none."""
    _process[:] = [] if rounds is None else [_Process(rounds, asyncio.get_running_loop())]


def deliver() -> str:
    """One round. Blocks; for RQ's worker within `inferq notifier`."""
    if not _process:
        raise CannotStart("webhooks are sent by `inferq notifier` (python -m webhooks.service), not by `rq worker`")
    process = _process[0]
    running = asyncio.run_coroutine_threadsafe(process.rounds.run(), process.loop)
    try:
        return running.result(_ROUND_LIMIT_S)
    except FutureTimeoutError:
        running.cancel()
        raise BrokerUnavailable(f"the round did not end within {_ROUND_LIMIT_S:g} s") from None
