"""Every system that needs nothing but this project's environment and nginx answers the benchmark's loads rightly."""

from __future__ import annotations

from pathlib import Path

from bench.jobs.inferq import queue_with_worker
from bench.processes import memory_mib
from bench.systems import started_systems
from bench.windows import SCENARIOS, measured

LOADS = [one for one in SCENARIOS if one.name in ("64 clients", "16 instant streams")]


async def test_each_system_passes_on_whole_answers_of_its_own(tmp_path: Path) -> None:
    """Each token of each answer has the marker of its request; CPU time and memory are read of each system."""
    names = ("direct", "nginx", "proxy", "inferq")
    async with started_systems(tmp_path, names, print) as systems:
        assert [system.name for system in systems] == list(names)
        for system in systems:
            for scenario in LOADS:
                one = await measured(scenario, system, speed=4)
                assert (one.load.tokens if scenario.stream else one.load.requests) > 0
                assert (one.cpu_us > 0) == (system.name != "direct")
                assert one.engine > 0
        assert set(systems[-1].pids) == {"router", "manager", "redis", "worker"}
        assert memory_mib(systems[-1].pids.values()) > 30


async def test_jobs_are_submitted_drained_and_counted(tmp_path: Path) -> None:
    """Their answers are checked as those of requests are; the server's commands are those that a job needs."""
    async with queue_with_worker(tmp_path / "queue", models=2) as queue:
        stats = await queue.submit_and_drain(200, tenants=10)
        assert min(stats.submit_per_s, stats.drain_per_s, stats.xadd_per_s) > 0
        assert set(stats.cpu_us_of) == {"worker", "manager", "redis", "submitter"}
        lone = await queue.server_cost(1, 20, models=2)
        batch = await queue.server_cost(32, 4, delay_us=20_000)
        assert lone.commands > batch.commands > 1
