"""inferq as a job queue: submit and drain, and what a job costs the queue's server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processes import foreign_cores, new_folder, snapshot
from ..systems import SLOTS, fake_engine, queue_and_manager, worker
from ..windows import cpu_us_by_name
from .dialogue import Submitter, submitter

IDLE_S = 1.5
LONE, BATCH, MANY_MODELS = "lone job", "job in a batch of 64", "lone job, worker of 1,000 models"
ONE_TENANT, MANY_TENANTS = "one of many waiting, 1 tenant", "one of many waiting, 1,000 tenants"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStats:
    """One run of jobs. ``cpu_us_of`` is per job, from submit to the last answer, of all processes (the queue's server
    and the submitter included); ``xadd_per_s`` is what redis-py's pipelined XADD takes, 0 where not measured."""

    name: str
    number: int
    submit_per_s: float
    drain_per_s: float
    cpu_us_of: Mapping[str, float]
    foreign: float
    xadd_per_s: float = 0.0

    @property
    def cpu_us(self) -> float:
        return sum(self.cpu_us_of.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCost:
    """What one job costs the queue's server, heartbeats and renewals of the idle fleet subtracted."""

    commands: float
    cpu_us: float
    foreign: float = 0.0


@dataclass(slots=True)
class Queue:
    """A queue with its Manager and one worker on the fake engine, and a submitter to it."""

    submitter: Submitter
    pids: Mapping[str, int]
    idle: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The worker sleeps. It is not ended: one that must first start would count its start as draining."""
        os.kill(self.pids["worker"], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pids["worker"], signal.SIGCONT)

    async def submit_and_drain(self, jobs: int, *, tenants: int = 1, number: int = 0, xadd: bool = True) -> JobStats:
        """Submit ``jobs`` jobs while the worker sleeps, wake it, and wait for the last answer."""
        reference = await self.submitter.ask({"do": "xadd", "jobs": jobs}) if xadd else {}
        before = snapshot()
        with self.asleep():
            submit = await self.submitter.ask({"do": "submit", "jobs": jobs, "tenants": tenants})
        drain = await self.submitter.ask({"do": "drain"})
        after = snapshot()
        spent = cpu_us_by_name(self.pids, before, after, jobs)
        spent["submitter"] = (submit["cpu_s"] + drain["cpu_s"]) * 1e6 / jobs
        return JobStats(
            name="inferq",
            number=number,
            submit_per_s=jobs / submit["seconds"],
            drain_per_s=jobs / drain["seconds"],
            cpu_us_of=spent,
            foreign=foreign_cores(before, after),
            xadd_per_s=jobs / reference["seconds"] if reference else 0.0,
        )

    async def server_cost(self, size: int, count: int, *, delay_us: int = 0, models: int = 1) -> ServerCost:
        """Of each job when ``size`` come at once, ``count`` times, jobs of ``models`` models in turn. The first job of
        each model, which makes its keys, is not measured."""
        if not self.idle:
            self.idle = await self.submitter.ask({"do": "idle", "seconds": IDLE_S})
        order = {"do": "bursts", "size": size, "delay_us": delay_us, "models": models}
        await self.submitter.ask({**order, "count": max(2, count // 10, models)})
        before = snapshot()
        used = await self.submitter.ask({**order, "count": count})
        after = snapshot()
        share = used["seconds"] / self.idle["seconds"]
        return ServerCost(
            commands=(used["commands"] - share * self.idle["commands"]) / size / count,
            cpu_us=(used["server_s"] - share * self.idle["server_s"]) * 1e6 / size / count,
            foreign=foreign_cores(before, after),
        )


@asynccontextmanager
async def queue_with_worker(folder: Path, *, models: int = 1) -> AsyncIterator[Queue]:
    """A :class:`Queue` whose worker serves ``models`` models."""
    new_folder(folder)
    async with (
        fake_engine(folder, "--models", str(models)) as (engine_port, _),
        queue_and_manager(folder) as (queue, manager_pid, manager_url),
        worker(folder, "worker", manager_url, queue.url, f"http://127.0.0.1:{engine_port}", slots=SLOTS) as worker_pid,
        submitter([sys.executable, "-m", "bench.jobs.submitter", queue.url], folder / "submitter.log") as asked,
    ):
        yield Queue(asked, {"worker": worker_pid, "manager": manager_pid, "redis": queue.pid or 0})


async def server_costs(folder: Path, *, speed: float = 1.0, jobs: int = 5000) -> dict[str, Any]:
    """Commands and server CPU of a lone job and of one in a batch of 64, and how both grow with models and tenants."""
    found: dict[str, Any] = {}
    few = max(20, int(300 / speed))
    async with queue_with_worker(folder / "one") as queue:
        found[LONE] = await queue.server_cost(1, few)
        found[BATCH] = await queue.server_cost(64, max(5, few // 8), delay_us=20_000)
        for name, tenants in ((ONE_TENANT, 1), (MANY_TENANTS, 1000)):
            stats = await queue.submit_and_drain(jobs, tenants=tenants, xadd=False)
            found[name] = ServerCost(commands=0.0, cpu_us=stats.cpu_us_of["redis"], foreign=stats.foreign)
    async with queue_with_worker(folder / "thousand", models=1000) as queue:
        found[MANY_MODELS] = await queue.server_cost(1, few, models=1000)
    return found
