"""The queue as a job queue: how fast jobs are put on it and run, beside plain pipelined XADD.

``python -m bench.jobs '{...}'`` (the fields of :class:`Order` as JSON) speaks line by line: it prints the XADD metrics,
then after each line on standard input the submit and the drain metrics.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage
from time import perf_counter

import redis.asyncio
import uvloop

from broker import Broker, BrokerSettings
from queue_schemas import END, Frame, Job, Marker, Pool, Tenant, new_job_id, new_session_id, shard_of_pool

XADD_PIPELINE = 100
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``jobs`` jobs with a body of ``body_bytes`` for the workers of ``model``."""

    redis_url: str
    model: str
    jobs: int = 5000
    body_bytes: int = 200


async def xadd_rate(order: Order, payload: bytes) -> float:
    """Entries a second of redis-py with pipelines of 100, into a stream that is removed afterwards."""
    stream = "bench:xadd"
    async with redis.asyncio.from_url(order.redis_url) as client:
        begun = perf_counter()
        for start in range(0, order.jobs, XADD_PIPELINE):
            async with client.pipeline(transaction=False) as pipeline:
                for _ in range(start, min(start + XADD_PIPELINE, order.jobs)):
                    pipeline.xadd(stream, {"job": payload})
                await pipeline.execute()
        took = perf_counter() - begun
        await client.delete(stream)
    return order.jobs / took


class _Answers:
    """Counts the jobs that ended."""

    def __init__(self, jobs: int) -> None:
        self._left = jobs
        self.all_in = asyncio.Event()

    def deliver(self, batch: Sequence[Frame | Marker]) -> None:
        for item in batch:
            if isinstance(item, Marker):
                raise RuntimeError(f"a job was not simply run: {item}")  # noqa: TRY004 - a wrong course, no wrong type
            if item.flags & END:
                if item.status != 200:
                    raise RuntimeError(f"a job failed: {item.data[:200]!r}")
                self._left -= 1
        if self._left == 0:
            self.all_in.set()


async def _main(order: Order) -> None:
    body = json.dumps({"model": order.model, "prompt": "x" * order.body_bytes}).encode()
    broker = await Broker.connect(BrokerSettings(redis_url=order.redis_url))
    inbox = new_session_id("bench-jobs")
    answers = _Answers(order.jobs)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(broker.replies.read(inbox, answers.deliver))
        await asyncio.wait_for(broker.replies.ready.wait(), LIMIT_S)
        jobs = [_job(order, body, inbox, broker.shards) for _ in range(order.jobs)]
        _print({"xadd_per_s": await xadd_rate(order, jobs[0].pack())})

        await _wait_for_line()
        spent, begun = _cpu_s(), perf_counter()
        await asyncio.gather(*map(broker.jobs.enqueue, jobs))
        took = perf_counter() - begun
        _print({"submit_per_s": order.jobs / took, "cpu_s": _cpu_s() - spent})

        await _wait_for_line()
        spent, begun = _cpu_s(), perf_counter()
        await asyncio.wait_for(answers.all_in.wait(), LIMIT_S)
        took = perf_counter() - begun
        _print({"drain_per_s": order.jobs / took, "cpu_s": _cpu_s() - spent})
        reading.cancel()
    await broker.close()


def _job(order: Order, body: bytes, inbox: str, shards: int) -> Job:
    pool = Pool(order.model)
    return Job(
        id=new_job_id(shard_of_pool(pool, shards)),
        tenant=Tenant("default"),
        model=pool,
        path="/tokenize",
        body=body,
        reply_to=inbox,
    )


def _cpu_s() -> float:
    usage = getrusage(RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _print(metrics: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(metrics) + "\n")
    sys.stdout.flush()


async def _wait_for_line() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    uvloop.run(_main(Order(**json.loads(sys.argv[1]))))
