"""taskiq on Redis streams, which acknowledge: ``taskiq_jobs.py worker|submit URL JOBS``."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from count import BODY, Counter, at_once, dialogue
from taskiq.api import run_receiver_task
from taskiq_redis import RedisStreamBroker

role, url, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
broker = RedisStreamBroker(url, queue_name="bench")
counter = Counter(url, jobs)


@broker.task(task_name="job")
async def job(body: str) -> None:
    counter.one(body)


async def worker() -> None:
    broker.is_worker_process = True
    receiving = asyncio.create_task(run_receiver_task(broker, max_async_tasks=512, max_prefetch=512, run_startup=True))
    await asyncio.sleep(0.5)  # it does not tell when it listens; the jobs wait in the stream anyway
    counter.ready()
    await receiving


async def submit() -> None:
    await broker.startup()
    await at_once(lambda: job.kiq(BODY), jobs)
    await broker.shutdown()


if role == "worker":
    uvloop.run(worker())
else:
    dialogue(url, jobs, lambda: uvloop.run(submit()))
