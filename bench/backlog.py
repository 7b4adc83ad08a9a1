"""Measure what a call costs Redis beside a long queue, and beside an empty one. ``python -m bench.backlog``.

Three Redis servers get the same calls in turns: enqueue, claim and settle, of one job and of a batch. At ``full`` jobs
of many tenants wait, and many workers hold leases. At ``empty`` nothing waits but the jobs of the call itself, of the
same tenants, claimed by the same workers; at ``alone`` these are of one tenant, claimed by one worker. The table shows
the CPU time of the servers for each job, as medians over the calls; with ``--instructions``, what they executed, which
other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import redis.asyncio
import uvloop
from rich.console import Console
from rich.table import Table

from broker import Broker, BrokerSettings, Budgets
from queue_schemas import Job, Lease, Outcome, SessionId, Settled, State, new_session_id
from queue_schemas.keys import ShardKeys
from telemetry import configure_logging
from tests.support.queue import Puller, answer_frame, make_job
from tests.support.servers import Server, redis_binary, valkey_binary

from .processes import cpu_clock_s, memory_mib

FILL_STEP = 2_048
HELD = 4
"""Jobs that each worker runs meanwhile."""
TTL_MS = 24 * 3600 * 1000
NO_LIMITS = Budgets(tenant_jobs=10**9, tenant_bytes=10**15, pool_jobs=10**9, pool_bytes=10**15)
Meter = Callable[[int], float]
"""What a server's process has used so far."""
T = TypeVar("T")


class NoServer(Exception):
    """The server to measure is not installed."""


def cpu_us(pid: int) -> float:
    """CPU time, us."""
    return cpu_clock_s(pid) * 1e6


@dataclass
class Callgrind:
    """Servers that run under valgrind, which counts the instructions that they execute. Its files are in ``folder``."""

    folder: Path
    so_far: dict[int, float] = field(default_factory=dict)

    def wrapper(self, binary: str) -> str:
        """A program that runs ``binary`` under callgrind, in the same process, and counts nothing yet."""
        path = self.folder / "counted-server"
        options = f"--tool=callgrind --instr-atstart=no --callgrind-out-file={self.folder}/counted.%p"
        path.write_text(f'#!/bin/sh\nexec valgrind {options} {binary} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def begin(self, pid: int) -> None:
        """Count from now on."""
        self._control("-i", "on", str(pid))

    def instructions(self, pid: int) -> float:
        """How many a server has executed so far."""
        self._control("-d", str(pid))
        for dump in self.folder.glob(f"counted.{pid}.*"):
            found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(), re.MULTILINE)
            if found is None:
                raise ValueError(f"{dump} has no totals")
            self.so_far[pid] = self.so_far.get(pid, 0.0) + float(found[1])
            dump.unlink()
        return self.so_far.get(pid, 0.0)

    @staticmethod
    def _control(*arguments: str) -> None:
        subprocess.run(["callgrind_control", *arguments], check=True, capture_output=True, timeout=60)


@dataclass
class Side:
    """A server, what comes there, and what its calls took, by operation, for each job."""

    server: Server
    broker: Broker
    client: redis.asyncio.Redis
    meter: Meter
    reply: SessionId
    body: bytes
    tenants: Iterator[str]
    workers: Iterator[Puller]
    spent: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    async def open(cls, server: Server, meter: Meter, body_bytes: int, tenants: int, workers: int) -> Side:
        """With ``workers`` that have joined, and jobs of ``tenants`` in turn."""
        broker = await Broker.connect(BrokerSettings(redis_url=server.url), budgets=NO_LIMITS)
        client, reply = server.client(), new_session_id("bench")
        await client.xadd(ShardKeys(0).reply(reply), {"o": "open"})
        names = itertools.cycle([f"tenant-{number}" for number in range(tenants)])
        joined = [await Puller(broker).join() for _ in range(workers)]
        return cls(server, broker, client, meter, reply, b"x" * body_bytes, names, itertools.cycle(joined))

    async def close(self) -> None:
        await self.broker.close()
        await self.client.aclose()

    async def fill(self, jobs: int, workers: int) -> None:
        """Have ``jobs`` jobs wait, and each worker run some."""
        left = jobs + workers * HELD
        while left > 0:
            await self._enqueue(min(FILL_STEP, left))
            left -= FILL_STEP
        for _ in range(workers):
            if len(await next(self.workers).claim(HELD)) != HELD:
                raise ValueError("a claim gave too few jobs")

    async def round(self, size: int) -> None:
        """``size`` jobs from their start to their end: as many wait afterwards as before."""
        await self._measured(f"enqueue {size}", size, self._enqueue(size))
        leases = await self._measured(f"claim {size}", size, next(self.workers).claim(size))
        if len(leases) != size:
            raise ValueError(f"a claim of {size} gave {len(leases)} jobs")
        await self._measured(f"settle {size}", size, self._settle(leases))
        await self.client.xtrim(ShardKeys(0).reply(self.reply), maxlen=1)

    async def _enqueue(self, number: int) -> None:
        states = await asyncio.gather(*(self.broker.jobs.enqueue(self._job()) for _ in range(number)))
        if set(states) != {State.QUEUED}:
            raise ValueError(f"not all jobs were queued: {set(states)}")

    def _job(self) -> Job:
        tenant = next(self.tenants)
        return make_job(tenant=tenant, body=self.body, ttl_ms=TTL_MS, reply_to=self.reply, cost_estimate=300)

    async def _settle(self, leases: Sequence[Lease]) -> None:
        settle = self.broker.attempts.settle
        answers = (settle(lease, Outcome.DONE, answer_frame(lease), used=250, run_ms=1_500) for lease in leases)
        if set(await asyncio.gather(*answers)) != {Settled.OK}:
            raise ValueError("not all jobs were settled")

    async def _measured(self, name: str, size: int, call: Awaitable[T]) -> T:
        begun = await asyncio.to_thread(self.meter, self.server.process.pid)
        answer = await call
        used = await asyncio.to_thread(self.meter, self.server.process.pid) - begun
        self.spent.setdefault(name, []).append(used / size)
        return answer


async def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Side]:
    """The three servers after their calls. Raises ``NoServer``, and ``TimeoutError`` after ``options.minutes``."""
    binary = redis_binary() if options.server == "redis" else valkey_binary()
    if binary is None:
        raise NoServer(f"{options.server} is not installed (Debian: apt-get install redis-server)")
    meter: Meter = cpu_us
    callgrind = Callgrind(folder)
    if options.instructions:
        binary, meter = callgrind.wrapper(binary), callgrind.instructions
    many = (options.tenants, options.workers)
    sides: dict[str, Side] = {}
    async with asyncio.timeout(options.minutes * 60):
        with ExitStack() as stack:
            for name, (tenants, workers) in {"alone": (1, 1), "empty": many, "full": many}.items():
                limit = ("--maxmemory", str(options.max_mib << 20))
                server = Server(binary, folder / name, limit, appendonly=False)
                stack.enter_context(server)
                sides[name] = await Side.open(server, meter, options.body_bytes, tenants, workers)
            begun = time.monotonic()
            await sides["full"].fill(options.jobs, options.workers)
            size = memory_mib([sides["full"].server.process.pid])
            say(f"{options.jobs:,} jobs wait, after {time.monotonic() - begun:.0f} s: {size:,.0f} MiB")
            for side in sides.values() if options.instructions else ():
                await asyncio.to_thread(callgrind.begin, side.server.process.pid)
            for jobs in (1, options.batch):
                for _ in range(options.calls):
                    for side in sides.values():
                        await side.round(jobs)
            for side in sides.values():
                await side.close()
    return sides


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.backlog", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000, help="that wait at the full server: 2 GB for a million")
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--calls", type=int, default=200, help="of each operation and size, at each server")
    parser.add_argument("--batch", type=int, default=64, help="jobs in the larger calls")
    parser.add_argument("--body-bytes", type=int, default=700, help="of a request: an envelope of 1 kB")
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--instructions", action="store_true", help="count them with valgrind; 20 times as slow")
    parser.add_argument("--max-mib", type=int, default=5_000, help="what a server may use")
    parser.add_argument("--minutes", type=float, default=40.0, help="after which it gives up")
    options = parser.parse_args(argv)
    configure_logging("bench", "error")
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        try:
            sides = uvloop.run(measure(Path(name), options, console.print))
        except (NoServer, TimeoutError) as error:
            console.print(f"{error or 'it took too long'}", style="red", markup=False, highlight=False)
            return 1
    unit = "instructions" if options.instructions else "CPU us"
    title = f"{unit} of Redis a job: {options.jobs:,} jobs of {options.tenants:,} tenants, {options.workers:,} workers"
    table = Table("call", *sides, "full / empty", "full / alone", title=title)
    for call in sides["full"].spent:
        alone, empty, full = (statistics.median(side.spent[call]) for side in sides.values())
        figures = (f"{figure:,.1f}" for figure in (alone, empty, full))
        table.add_row(call, *figures, f"{full / empty:.2f}", f"{full / alone:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
