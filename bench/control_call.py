"""A Router's call to its Manager: Ray's remote call beside HTTP, on the same work. ``python -m bench.control_call``.

Both calls are made by a Serve replica, with the Router's own two adapters, to two Managers that do the same: take in
the heartbeat of a worker they know, and answer its assignment. One is the actor, one the HTTP service, each on a Redis
of its own. The last line is what requests need instead: a look at the table that the Router reads once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
import uvloop
from ray import serve
from rich.console import Console
from rich.table import Table

from broker import BrokerSettings
from broker.embedded.server import EmbeddedServer
from manager.ray_actor import ensure_manager
from manager.settings import ManagerSettings
from queue_schemas import (
    FABRIC_PREFIX,
    RAY_NAMESPACE,
    EngineState,
    Heartbeat,
    Registration,
    WorkerInfo,
    new_session_id,
)
from router.composition import open_manager
from router.model_directory import Directory, build_directory
from telemetry import TelemetrySettings
from telemetry.environment import free_port
from telemetry.http.fabric_calls import FabricCall
from tests.support.waiting import eventually

from .processes import cpu_seconds, running, until_answers

WORKER = "bench-worker"
MODEL = "sim"
TIMEOUT_MS = 10_000
WARM_UP = 50
LOOKS = 200_000


@dataclass(frozen=True, slots=True)
class CallStats:
    """One round of calls: times in milliseconds, CPU in microseconds a call (caller's and Manager's processes)."""

    p50: float
    p99: float
    cpu_us: float
    per_s: float


class Caller:
    """What runs in the Serve replica."""

    async def measure(self, where: str, manager_pid: int, session_id: str, calls: int, concurrency: int) -> CallStats:
        """``calls`` heartbeats to the Manager at ``where``, ``concurrency`` at a time."""
        manager = open_manager(where, "", TIMEOUT_MS)
        heartbeat = Heartbeat(session_id=session_id, models=[MODEL], slots=8, engine=EngineState.READY)
        call = FabricCall(
            "POST", f"{FABRIC_PREFIX}/workers/{WORKER}/heartbeat", body=heartbeat.model_dump_json().encode()
        )
        times: list[float] = []

        async def some(count: int) -> None:
            for _ in range(count):
                begun = time.perf_counter()
                answer = await manager.forward(call)
                times.append((time.perf_counter() - begun) * 1000)
                if answer.status != 200:
                    raise RuntimeError(f"{where} answers {answer.status}: {answer.body!r}")

        try:
            await some(WARM_UP)
            times.clear()
            processes = {os.getpid(), manager_pid}
            cpu, begun = _cpu(processes), time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(some(calls // concurrency))
            spent, passed = _cpu(processes) - cpu, time.perf_counter() - begun
        finally:
            await manager.close()
        cuts = statistics.quantiles(times, n=100)
        return CallStats(cuts[49], cuts[98], spent / len(times) * 1e6, len(times) / passed)

    async def look_up(self, directory: Directory) -> float:
        """Nanoseconds of one look at the cached table, as every request makes it."""
        begun = time.perf_counter()
        for _ in range(LOOKS):
            directory.workers_of(MODEL)
        return (time.perf_counter() - begun) / LOOKS * 1e9


def _cpu(processes: set[int]) -> float:
    return sum(seconds for pid, seconds in cpu_seconds(processes).items() if pid in processes)


async def _register(where: str) -> str:
    """Register a worker, once the Manager at ``where`` acts; the session_id."""
    manager = open_manager(where, "", TIMEOUT_MS)
    session_id = str(new_session_id(WORKER))
    registration = Registration(
        worker_id=WORKER, session_id=session_id, models=[MODEL], slots=8, engine=EngineState.READY
    )
    call = FabricCall("POST", f"{FABRIC_PREFIX}/workers", body=registration.model_dump_json().encode())

    async def registered() -> bool:
        return (await manager.forward(call)).status == 200

    try:
        await eventually(registered, f"the Manager at {where} registers a worker", limit_s=30, every_s=0.1)
    finally:
        await manager.close()
    return session_id


@asynccontextmanager
async def _http_manager(folder: Path, url: str) -> AsyncIterator[tuple[str, int]]:
    port, log = free_port(), folder / "manager.log"
    async with running("manager.service", ("--port", str(port), "--redis-url", url), log) as pid:
        where = f"http://127.0.0.1:{port}"
        await until_answers(f"{where}/readyz", log)
        yield where, pid


async def _run(options: argparse.Namespace, console: Console) -> None:
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="inferq-bench-")))
        queues = [await exits.enter_async_context(EmbeddedServer(folder / name)) for name in ("ray", "http")]
        http, http_pid = await exits.enter_async_context(_http_manager(folder, queues[1].url))
        actor = ensure_manager(
            ManagerSettings.load(), BrokerSettings.load(redis_url=queues[0].url), TelemetrySettings.load()
        )
        actor_pid = (await actor.facts.remote()).pid
        replica: Any = serve.deployment(Caller)
        caller = serve.run(replica.options(ray_actor_options={"num_cpus": 0}).bind(), name="bench", route_prefix=None)
        sessions = [await _register(where) for where in ("ray:manager", http)]
        found: dict[tuple[int, str], list[CallStats]] = {}
        for number in range(options.rounds):
            ways = [("Ray", "ray:manager", actor_pid, sessions[0]), ("HTTP", http, http_pid, sessions[1])]
            for concurrency in (1, 16):
                for name, where, pid, session_id in ways[:: 1 if number % 2 else -1]:
                    one = await caller.measure.remote(where, pid, session_id, options.calls, concurrency)
                    found.setdefault((concurrency, name), []).append(one)
        async with aiohttp.ClientSession() as session, session.get(f"{http}{FABRIC_PREFIX}/workers") as answer:
            fleet = [WorkerInfo.model_validate(info) for info in (await answer.json())["workers"]]
        look_ns = await caller.look_up.remote(build_directory(fleet, (), (), Directory(), 0))
    _print(found, look_ns, options, console)


def _print(
    found: dict[tuple[int, str], list[CallStats]], look_ns: float, options: argparse.Namespace, console: Console
) -> None:
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, Ray {ray.__version__}; "
        f"{options.rounds} rounds of {options.calls} calls, medians"
    )
    table = Table("calls at once", "way", "p50 ms", "p99 ms", "CPU us/call", "calls/s")
    for (concurrency, name), rounds in found.items():
        medians = [statistics.median(getattr(one, field) for one in rounds) for field in CallStats.__slots__]
        table.add_row(
            str(concurrency), name, *(f"{value:,.2f}" for value in medians[:2]), *(f"{v:,.0f}" for v in medians[2:])
        )
    for concurrency in (1, 16):
        pairs = list(zip(found[concurrency, "Ray"], found[concurrency, "HTTP"], strict=True))
        ratios = [statistics.median(getattr(r, f) / getattr(h, f) for r, h in pairs) for f in CallStats.__slots__]
        table.add_row(str(concurrency), "Ray : HTTP", *(f"{ratio:.2f}" for ratio in ratios), style="bold")
    console.print(table)
    console.print(
        f"The cached table of the fleet: {look_ns:,.0f} ns a look; requests make no call at all, "
        "and a Router reads the table once a second for all of them."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark on a Ray of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.control_call", description="Ray's remote call beside HTTP.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000, help="calls in a round, each way")
    options = parser.parse_args(argv)
    if "RAY_AUTH_TOKEN" not in os.environ:  # Ray reads it when it is imported
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = (sys.executable, "-m", "bench.control_call", *(sys.argv[1:] if argv is None else argv))
        os.execve(sys.executable, command, os.environ | own)  # noqa: S606 - no shell is the point
    ray.init(namespace=RAY_NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        uvloop.run(_run(options, Console(width=120)))
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
