"""arq: ``arq_jobs.py worker|submit URL JOBS``. Without results, which inferq's workers deliver and arq would store."""

from __future__ import annotations

import sys
from typing import Any

import uvloop
from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from count import BODY, Counter, at_once, dialogue

role, url, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
counter = Counter(url, jobs)
settings = RedisSettings.from_dsn(url)


async def job(_context: dict[Any, Any], body: str) -> None:
    counter.one(body)


async def started(_context: dict[Any, Any]) -> None:
    counter.ready()


async def worker() -> None:
    await Worker(
        [func(job, name="job", keep_result=0)],
        redis_settings=settings,
        on_startup=started,
        max_jobs=512,
        poll_delay=0.01,
        handle_signals=False,
    ).async_run()


async def submit() -> None:
    pool = await create_pool(settings)
    await at_once(lambda: pool.enqueue_job("job", BODY), jobs)
    await pool.aclose()


if role == "worker":
    uvloop.run(worker())
else:
    dialogue(url, jobs, lambda: uvloop.run(submit()))
