"""RQ: ``rq_jobs.py worker|submit URL JOBS``. Jobs go in by a pipeline; the worker forks no process for each."""

from __future__ import annotations

import logging
import sys

import redis
from count import BODY, Counter, dialogue
from rq import Queue, SimpleWorker

role, url, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
counter = Counter(url, jobs)
queue = Queue("bench", connection=redis.Redis.from_url(url))


def job(body: str) -> None:
    counter.one(body)


def submit() -> None:
    queue.enqueue_many([Queue.prepare_data("__main__.job", (BODY,), result_ttl=0) for _ in range(jobs)])


if role == "worker":
    logging.disable(logging.WARNING)
    counter.ready()
    SimpleWorker([queue], connection=queue.connection).work(logging_level="ERROR")
else:
    dialogue(url, jobs, submit)
