"""What the workers of all job queues share: jobs do nothing but count, and the last one is reported through Redis."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import redis

READY, DONE = "bench:ready", "bench:done"
LIMIT_S = 120
BODY = "x" * 200
TASKS = 64


class Counter:
    """Counts jobs; says so once the worker is ready and after every ``jobs`` of them."""

    def __init__(self, url: str, jobs: int) -> None:
        self._redis = redis.Redis.from_url(url)
        self._jobs = jobs
        self._count = 0

    def ready(self) -> None:
        self._redis.rpush(READY, 1)

    def one(self, body: str) -> None:
        if body != BODY:
            raise ValueError(f"a job came with another body: {body[:100]!r}")
        self._count += 1
        if self._count % self._jobs == 0:
            self._redis.rpush(DONE, self._count)


async def at_once(put: Callable[[], Awaitable[object]], jobs: int) -> None:
    """Call ``put`` for each job, in as many tasks as redis-py has connections for."""
    left = iter(range(jobs))

    async def some() -> None:
        for _ in left:
            await put()

    await asyncio.gather(*(some() for _ in range(TASKS)))


def until(url: str, key: str) -> int:
    """Wait for a worker's message."""
    message = redis.Redis.from_url(url, socket_timeout=LIMIT_S + 5).blpop([key], timeout=LIMIT_S)
    if message is None:
        sys.exit(f"{key} did not come within {LIMIT_S} s")
    return int(message[1])


def dialogue(url: str, jobs: int, submit: Callable[[], None]) -> None:
    """The submitter's side: wait for the worker, then submit, then wait for the last job; a line of input before each
    step, a line with its seconds and this process's CPU time behind it."""
    until(url, READY)
    _say({"ready": 1})
    sys.stdin.readline()
    begun, spent = time.perf_counter(), time.process_time()
    submit()
    _say({"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - spent})
    sys.stdin.readline()
    begun, spent = time.perf_counter(), time.process_time()
    if until(url, DONE) != jobs:
        sys.exit("another number of jobs was run than submitted")
    _say({"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - spent})


def _say(found: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
