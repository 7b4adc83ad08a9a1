"""RQ's worker, in a thread of the process: it takes one job after the other from one queue and runs each to its end.

RQ's own loop wants the main thread's signals and ends for good when Redis goes away in the wrong moment. This one uses
the same public steps, looks at ``stop`` between them, and begins again as another worker after an outage. A worker of
RQ that listens on several queues can lose a job when it dies; one queue it moves atomically.
"""

from __future__ import annotations

import logging
import secrets
import threading

import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from telemetry import get_logger

IDLE_S = 1
"""How often an idle worker looks whether it is to stop."""
_WORKER_TTL_S = 30
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 2.0

log = get_logger(__name__)


class _Worker(SimpleWorker):
    death_penalty_class = TimerDeathPenalty
    max_connection_wait_time = _MAX_PAUSE_S

    def procline(self, message: str) -> None:
        """The process's title is not ours alone to change."""


def run_rq_worker(queue: Queue, connection: redis.Redis, name: str, stop: threading.Event) -> None:
    """Work until ``stop`` is set, a step that runs then to its end. ``connection`` is for this worker alone."""
    for part in ("worker", "job", "queue", "registry"):
        logging.getLogger(f"rq.{part}").setLevel(logging.WARNING)
    pause = _FIRST_PAUSE_S
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
            pause = _FIRST_PAUSE_S
            _work(worker, stop)
        except (redis.RedisError, OSError) as error:
            log.warning("rq_worker_interrupted", error=f"{type(error).__name__}: {error}", again_in_s=pause)
            stop.wait(pause)
            pause = min(pause * 2, _MAX_PAUSE_S)
        finally:
            if worker is not None:
                _leave(worker)


def _work(worker: _Worker, stop: threading.Event) -> None:
    while not stop.is_set():
        if worker.should_run_maintenance_tasks:
            worker.run_maintenance_tasks()  # type: ignore[no-untyped-call]
        found = worker.dequeue_job_and_maintain_ttl(IDLE_S, max_idle_time=IDLE_S)
        if found is not None:
            job, queue = found
            worker.execute_job(job, queue)


def _leave(worker: _Worker) -> None:
    try:
        worker.teardown()  # type: ignore[no-untyped-call]
    except (redis.RedisError, OSError) as error:
        log.debug("rq_worker_not_deregistered", error=str(error))  # it expires
