"""FastStream on Redis streams: ``faststream_jobs.py worker|submit URL JOBS``."""

from __future__ import annotations

import sys

import uvloop
from count import BODY, Counter, at_once, dialogue
from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub

role, url, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
broker = RedisBroker(url, logger=None)


def worker() -> None:
    counter = Counter(url, jobs)
    app = FastStream(broker, logger=None)

    @broker.subscriber(stream=StreamSub("bench", group="bench", consumer="one", max_records=512))
    async def job(body: str) -> None:
        counter.one(body)

    @app.after_startup
    async def started() -> None:
        counter.ready()

    uvloop.run(app.run())


async def submit() -> None:
    async with broker:
        await at_once(lambda: broker.publish(BODY, stream="bench"), jobs)


if role == "worker":
    worker()
else:
    dialogue(url, jobs, lambda: uvloop.run(submit()))
