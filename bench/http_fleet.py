"""A hundred workers over HTTP at one Router, beside a hundred at Redis. ``python -m bench.http_fleet``.

The workers are sessions in this process, which is not counted: each joins, renews its leases, is parked, and answers
what it is given at once. Measured: memory and CPU of Router and Redis while nothing happens, and how long a lone
request takes from its client to a worker and back.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from broker import Broker, BrokerSettings
from queue_schemas import (
    END,
    HEAD,
    ControlKind,
    EngineState,
    Frame,
    Lane,
    Lease,
    Outcome,
    Pool,
    Registration,
    SessionId,
    new_session_id,
)
from telemetry.environment import free_port
from worker.over_http.manager_client import HttpManagerClient
from worker.over_http.queue import HttpQueue
from worker.queue import Queue
from worker.registration.addresses import Addresses
from worker.registration.manager_client import ManagerClient

from .processes import memory_mib, new_folder, running, snapshot, until_answers
from .systems import MODEL, queue_and_manager

SLOTS = 4
IDLE_S = 20.0
REQUESTS = 400
LEASE_S = 15.0
BODY = b'{"choices": [{"message": {"content": "ok"}}]}'
LANES = tuple(Lane)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kind of fleet: MiB, CPU in thousandths of a core while idle, latency of lone requests (ms)."""

    router_mib: float
    redis_mib: float
    router_cpu: float
    redis_cpu: float
    p50_ms: float
    p99_ms: float


class Session:
    """One worker's session on ``queue``."""

    def __init__(self, queue: Queue, session_id: SessionId) -> None:
        self._queue = queue
        self._session_id = session_id
        self._seq = self._received = 0

    async def run(self) -> None:
        """Claim, and answer what comes, until cancelled."""
        workers, after = self._queue.workers, "0"
        await workers.join(self._session_id)
        await self._claim()
        renewing = asyncio.create_task(self._renew())
        try:
            while True:
                for message_id, message in await workers.read_control(0, self._session_id, after, 5_000):
                    after = message_id
                    if message is not None and message.kind is ControlKind.JOB and message.lease is not None:
                        self._received += 1
                        await self._answer(message.lease)
                        await self._claim()
                    elif message is not None and message.kind is ControlKind.WAKE:
                        await self._claim()
        finally:
            renewing.cancel()

    async def _claim(self) -> None:
        self._seq += 1
        pools = [(Pool(MODEL), LANES)]
        claimed = await self._queue.workers.claim(
            0, self._session_id, self._seq, 0, SLOTS, pools, offer=SLOTS, received=self._received, slots=SLOTS,
            capacity=SLOTS,
        )  # fmt: skip
        for lease in claimed.leases:
            await self._answer(lease)

    async def _answer(self, lease: Lease) -> None:
        frame = Frame(lease.job.id, lease.epoch, lease.attempt_id, 0, HEAD | END, BODY, 200, "application/json")
        await self._queue.attempts.settle(lease, Outcome.DONE, frame.pack())

    async def _renew(self) -> None:
        renewer = self._queue.workers.renewer_apart()
        while True:
            await asyncio.sleep(LEASE_S / 5)
            await renewer.renew(self._session_id)


@asynccontextmanager
async def fleet(count: int, router_url: str, redis_url: str, *, http: bool) -> AsyncIterator[None]:
    """``count`` workers that have joined, until the block ends."""
    addresses = Addresses([router_url])
    queues: list[Queue] = []
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number in range(count):
            session_id = new_session_id(f"bench-{number}")
            status = Registration(
                worker_id=f"bench-{number}", session_id=session_id, models=[MODEL], slots=SLOTS,
                engine=EngineState.READY,
            )  # fmt: skip
            client = (HttpManagerClient if http else ManagerClient)(addresses)
            await client.register(status)
            await client.close()
            queue = HttpQueue(addresses, 1) if http else await Broker.connect(BrokerSettings(redis_url=redis_url))
            queues.append(queue)
            tasks.append(group.create_task(Session(queue, session_id).run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
    for queue in queues:
        await queue.close()


async def measured(folder: Path, count: int, *, http: bool) -> Cost:
    """The cost of one kind of fleet, on a fabric of its own."""
    async with AsyncExitStack() as exits:
        queue, _, manager_url = await exits.enter_async_context(queue_and_manager(folder))
        port, log = free_port(), folder / "router.log"
        options = ("--port", str(port), "--manager-url", manager_url, "--redis-url", queue.url, "--log-level", "error")
        pid = await exits.enter_async_context(running("router.service", options, log))
        url = f"http://127.0.0.1:{port}"
        await until_answers(f"{url}/readyz", log)
        redis_pid = queue.pid or 0
        await exits.enter_async_context(fleet(count, url, queue.url, http=http))
        await until_answers(f"{url}/v1/models", log, wanted=f'"{MODEL}"')
        before = snapshot()
        await asyncio.sleep(IDLE_S)
        after = snapshot()
        latencies = await lone_requests(url)
        return Cost(
            memory_mib([pid]),
            memory_mib([redis_pid]),
            (after.cpu_s(pid) - before.cpu_s(pid)) / IDLE_S * 1000,
            (after.cpu_s(redis_pid) - before.cpu_s(redis_pid)) / IDLE_S * 1000,
            statistics.median(latencies) * 1000,
            sorted(latencies)[len(latencies) * 99 // 100] * 1000,
        )


async def lone_requests(url: str) -> list[float]:
    """How long each of ``REQUESTS`` took, one after the other (s)."""
    latencies = []
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    async with aiohttp.ClientSession() as session:
        for _ in range(REQUESTS):
            began = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert await answer.read() == BODY
            latencies.append(time.perf_counter() - began)
    return latencies


async def run(counts: Sequence[int], console: Console) -> None:
    """Measure and print."""
    table = Table(
        "workers", "transport", "Router MiB", "Redis MiB", "Router CPU, idle", "Redis CPU, idle", "p50 ms", "p99 ms"
    )
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        for count in counts:
            for http in (False, True):
                cost = await measured(new_folder(Path(name) / f"{count}-{http}"), count, http=http)
                figures = (cost.router_mib, cost.redis_mib, cost.router_cpu, cost.redis_cpu, cost.p50_ms, cost.p99_ms)
                table.add_row(str(count), "http" if http else "redis", *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    console.print("CPU in thousandths of a core; latency of lone requests, one after the other")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 100])
    uvloop.run(run(parser.parse_args(argv).workers, Console(width=140)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
