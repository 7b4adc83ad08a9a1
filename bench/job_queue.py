"""Submit and drain of jobs, measured with a worker whose engine takes no time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from telemetry.environment import free_port

from .jobs import LIMIT_S, Order
from .processes import cpu_seconds, new_folder, running, until_answers
from .systems import MODEL, queue_and_manager


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStats:
    """``cpu_us`` is per job, from submit to the last answer, over all processes (Redis and the submitter included)."""

    xadd_per_s: float
    submit_per_s: float
    drain_per_s: float
    cpu_us: float
    cpu_us_of: Mapping[str, float]


async def measured_jobs(folder: Path, jobs: int) -> JobStats:
    """Submit ``jobs`` jobs while the worker sleeps, wake it, and wait for the last answer."""
    async with queue_and_manager(new_folder(folder)) as (queue, manager_pid, manager_url):
        port, log = free_port(), folder / "jobs-worker.log"
        options = (
            *("--worker-id", "bench-jobs", "--port", str(port), "--manager-url", manager_url, "--redis-url", queue.url),
            *("--engine", "sim", "--model", MODEL, "--sim-instant", "--log-level", "warning"),
        )
        async with running("worker.service", options, log) as worker_pid:
            await until_answers(f"http://127.0.0.1:{port}/readyz", log)
            pids = {"worker": worker_pid, "manager": manager_pid, "redis": queue.pid or 0}
            order = Order(redis_url=queue.url, model=MODEL, jobs=jobs)
            async with asyncio.timeout(3 * LIMIT_S):
                return await _dialogue(order, worker_pid, pids)


async def _dialogue(order: Order, worker_pid: int, pids: Mapping[str, int]) -> JobStats:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.jobs", json.dumps(asdict(order))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        xadd = await _read_line(process)
        before = _cpu_by_name(pids)
        # Asleep, not stopped: a worker that must first be started would count its start as draining.
        os.kill(worker_pid, signal.SIGSTOP)
        try:
            submit = await _request(process)
        finally:
            os.kill(worker_pid, signal.SIGCONT)
        drain = await _request(process)
        after = _cpu_by_name(pids)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    spent = {name: (after[name] - before[name]) * 1e6 / order.jobs for name in after}
    spent["submitter"] = (submit["cpu_s"] + drain["cpu_s"]) * 1e6 / order.jobs
    return JobStats(
        xadd_per_s=xadd["xadd_per_s"],
        submit_per_s=submit["submit_per_s"],
        drain_per_s=drain["drain_per_s"],
        cpu_us=sum(spent.values()),
        cpu_us_of=spent,
    )


async def _request(process: asyncio.subprocess.Process) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    await process.stdin.drain()
    return await _read_line(process)


async def _read_line(process: asyncio.subprocess.Process) -> dict[str, float]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the submitter of jobs ended too early: see its error output")
    metrics: dict[str, float] = json.loads(line)
    return metrics


def _cpu_by_name(pids: Mapping[str, int]) -> dict[str, float]:
    return {name: sum(cpu_seconds([pid]).values()) for name, pid in pids.items()}
