"""Puts jobs on inferq's queue and waits for their answers: a process of its own, so that its CPU time is known.

``python -m bench.jobs.submitter REDIS_URL`` takes orders from standard input, one JSON object a line, and answers each
with one: ``xadd``, ``submit``, ``drain``, ``bursts``, ``idle`` (the methods of :class:`Submitter`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any

import redis.asyncio
import uvloop

from broker import Broker, BrokerSettings
from queue_schemas import END, Frame, Job, Marker, Pool, Tenant, new_job_id, new_session_id, shard_of_pool

XADD_PIPELINE = 100
LIMIT_S = 300.0
BODY_BYTES = 200


class Answers:
    """The jobs that have not ended, each with the marker that its answer must have."""

    def __init__(self) -> None:
        self._open: dict[str, bytes] = {}
        self._none_left = asyncio.Event()
        self._failure = ""

    def expect(self, job: Job, marker: bytes) -> None:
        self._open[job.id] = marker
        self._none_left.clear()

    def deliver(self, batch: Sequence[Frame | Marker]) -> None:
        """What the reply stream brings."""
        for item in batch:
            if isinstance(item, Marker):
                self._fail(f"a job was not simply run: {item}")
            elif item.flags & END:
                marker = self._open.pop(item.job_id, None)
                if marker is None:
                    self._fail(f"{item.job_id} was answered twice, or was never submitted")
                elif item.status != 200 or marker not in item.data:
                    self._fail(f"{item.job_id} was answered with {item.status} {item.data[:300]!r}")
        if not self._open:
            self._none_left.set()

    async def all_in(self) -> None:
        """Wait for the last answer. Raises ``RuntimeError`` if one is wrong or missing."""
        try:
            await asyncio.wait_for(self._none_left.wait(), LIMIT_S)
        except TimeoutError:
            self._fail(f"{len(self._open)} jobs did not end within {LIMIT_S:g} s")
        if self._failure:
            raise RuntimeError(self._failure)

    def _fail(self, what: str) -> None:
        self._failure = self._failure or what
        self._none_left.set()


class Submitter:
    """Each method is an order, and returns its answer."""

    def __init__(self, url: str, broker: Broker, session: str, answers: Answers) -> None:
        self._url = url
        self._broker = broker
        self._session = session
        self._answers = answers
        self._server = redis.asyncio.from_url(url)

    async def xadd(self, jobs: int) -> dict[str, float]:
        """redis-py with pipelines of 100, into a stream that is removed afterwards."""
        stream, payload = "bench:xadd", self._job("sim", "default", 0)[0].pack()
        begun = perf_counter()
        for start in range(0, jobs, XADD_PIPELINE):
            async with self._server.pipeline(transaction=False) as pipeline:
                for _ in range(start, min(start + XADD_PIPELINE, jobs)):
                    pipeline.xadd(stream, {"job": payload})
                await pipeline.execute()
        took = perf_counter() - begun
        await self._server.delete(stream)
        return {"seconds": took}

    async def submit(self, jobs: int, tenants: int = 1) -> dict[str, float]:
        """Put ``jobs`` jobs on the queue, of ``tenants`` tenants in turn."""
        made = [self._job("sim", f"t{number % tenants}", 0) for number in range(jobs)]
        return await self._timed(self._enqueue(made))

    async def drain(self) -> dict[str, float]:
        """Wait until all are answered."""
        return await self._timed(self._answers.all_in())

    async def bursts(self, size: int, count: int, delay_us: int, models: int = 1) -> dict[str, float]:
        """``count`` times: put ``size`` jobs on the queue at once and wait for their answers."""

        async def all_of_them() -> None:
            for number in range(count):
                model = f"sim-{number % models}" if number % models else "sim"
                await self._enqueue([self._job(model, "default", delay_us) for _ in range(size)])
                await self._answers.all_in()

        return await self._timed(all_of_them())

    async def idle(self, seconds: float) -> dict[str, float]:
        """What the server does when there is nothing to do."""
        return await self._timed(asyncio.sleep(seconds))

    async def _enqueue(self, made: Sequence[tuple[Job, bytes]]) -> None:
        for job, marker in made:
            self._answers.expect(job, marker)
        await asyncio.gather(*(self._broker.jobs.enqueue(job) for job, _ in made))

    async def _timed(self, work: Any) -> dict[str, float]:
        """The time of ``work``, this process's CPU time, and the server's commands and CPU time meanwhile. Commands
        within scripts count, each script's call too."""
        commands, server_s = await self._server_use()
        spent, begun = _cpu_s(), perf_counter()
        await work
        took, cpu_s = perf_counter() - begun, _cpu_s() - spent
        commands_after, server_after_s = await self._server_use()
        return {
            "seconds": took,
            "cpu_s": cpu_s,
            "commands": commands_after - commands - 2,  # the two that ask
            "server_s": server_after_s - server_s,
        }

    async def _server_use(self) -> tuple[int, float]:
        stats = await self._server.info("commandstats")
        cpu = await self._server.info("cpu")
        return sum(one["calls"] for one in stats.values()), cpu["used_cpu_user"] + cpu["used_cpu_sys"]

    def _job(self, model: str, tenant: str, delay_us: int) -> tuple[Job, bytes]:
        """A job for the fake engine, and the marker that its answer must have (see ``engine.c``)."""
        marker = secrets.token_hex(8)
        prompt = f"{'x' * BODY_BYTES} [bench {marker} {delay_us} 0 1]"
        body = json.dumps({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": prompt}]}).encode()
        pool = Pool(model)
        job = Job(
            id=new_job_id(shard_of_pool(pool, self._broker.shards)),
            tenant=Tenant(tenant),
            model=pool,
            path="/v1/chat/completions",
            body=body,
            reply_to=self._session,
        )
        return job, f'"{marker}.0 "'.encode()


async def _main(url: str) -> None:
    broker = await Broker.connect(BrokerSettings(redis_url=url))
    session, answers = new_session_id("bench-jobs"), Answers()
    submitter = Submitter(url, broker, session, answers)
    reading = asyncio.create_task(broker.replies.read(session, answers.deliver))
    await asyncio.wait_for(broker.replies.ready.wait(), LIMIT_S)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        answer = await getattr(submitter, order.pop("do"))(**order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    reading.cancel()
    await asyncio.wait((reading,))
    await broker.close()


def _cpu_s() -> float:
    usage = getrusage(RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1]))
