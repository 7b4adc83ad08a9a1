"""Run RQ's jobs in a thread beside the event loop of batcher and notifier, one after the other, from one queue.

RQ's own ``Worker.work`` needs the main thread's signals and ends for good if Redis fails at the wrong moment. This loop
makes the same public calls, checks whether to stop between jobs, and registers as a new RQ worker after an outage. An
RQ worker that listens on several queues can lose a job when it dies; from one queue RQ moves jobs atomically.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress

import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from queue_schemas import CannotStart
from telemetry import get_logger
from telemetry.backoff import Backoff

IDLE_S = 1
"""How often an idle worker checks whether to stop."""
_WORKER_TTL_S = 30
_MAX_PAUSE_S = 2.0
_BACKOFF = Backoff(0.1, _MAX_PAUSE_S)

log = get_logger(__name__)


class RqWorkerThread:
    """An RQ worker in a thread. For one event loop."""

    def __init__(self, queue: Queue, connection: redis.Redis, name: str) -> None:
        """``connection`` is for this worker alone; ``name`` is the first part of its name in RQ."""
        self._queue, self._connection, self._name = queue, connection, name
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._ended = asyncio.Event()

    async def run(self, stop: asyncio.Event, *, on_stop: Callable[[], None], limit_s: float) -> None:
        """Work until ``stop`` is set; then call ``on_stop`` and give the running job ``limit_s`` to end.

        Raises ``CannotStart`` if the worker ends by itself.
        """
        # A daemon: a thread that hangs in a call must not keep the process from ending.
        threading.Thread(target=self._run, name="rq worker", daemon=True).start()
        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(stop.wait()), tasks.create_task(self._ended.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        on_stop()
        self._stop.set()
        try:
            async with asyncio.timeout(limit_s):
                await self._ended.wait()
        except TimeoutError:
            log.warning("rq_job_cut_short", limit_s=limit_s)
        if not stop.is_set():
            raise CannotStart("RQ's worker ended unexpectedly: see the log for the reason")

    def _run(self) -> None:
        try:
            run_rq_worker(self._queue, self._connection, self._name, self._stop)
        except Exception:
            log.exception("rq_worker_crashed")
        finally:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._ended.set)


class _Worker(SimpleWorker):
    death_penalty_class = TimerDeathPenalty
    max_connection_wait_time = _MAX_PAUSE_S

    def procline(self, message: str) -> None:
        """Leave the process's title alone: the process does more than RQ's jobs."""


def run_rq_worker(queue: Queue, connection: redis.Redis, name: str, stop: threading.Event) -> None:
    """Work until ``stop`` is set and the running job has ended. Blocks."""
    for part in ("worker", "job", "queue", "registry"):
        logging.getLogger(f"rq.{part}").setLevel(logging.WARNING)
    failures = 0
    while not stop.is_set():
        worker: _Worker | None = None
        try:
            worker = _Worker(
                [Queue(queue.name, connection=connection, serializer=JSONSerializer, job_class=queue.job_class,
                       death_penalty_class=TimerDeathPenalty)],
                name=f"{name}.{secrets.token_hex(8)}",
                connection=connection,
                serializer=JSONSerializer,
                job_class=queue.job_class,
                worker_ttl=_WORKER_TTL_S,
            )  # fmt: skip
            worker.bootstrap(logging_level=None)
            failures = 0
            _work(worker, stop)
        except (redis.RedisError, OSError) as error:
            failures += 1
            pause_s = round(_BACKOFF.pause_s(failures), 3)
            log.warning("rq_worker_interrupted", error=f"{type(error).__name__}: {error}", retry_in_s=pause_s)
            stop.wait(pause_s)
        finally:
            if worker is not None:
                _deregister(worker)


def _work(worker: _Worker, stop: threading.Event) -> None:
    while not stop.is_set():
        if worker.should_run_maintenance_tasks:
            worker.run_maintenance_tasks()  # type: ignore[no-untyped-call]
        found = worker.dequeue_job_and_maintain_ttl(IDLE_S, max_idle_time=IDLE_S)
        if found is not None:
            job, queue = found
            worker.execute_job(job, queue)


def _deregister(worker: _Worker) -> None:
    try:
        worker.teardown()  # type: ignore[no-untyped-call]
    except (redis.RedisError, OSError) as error:
        log.debug("rq_worker_not_deregistered", error=str(error))  # its registration expires
