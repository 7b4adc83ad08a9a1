"""Measure the cost of a large fleet's heartbeats, and of workers without a Manager. ``python -m bench.many_workers``.

First, simulated workers send heartbeats, each with another number of running jobs, to a Manager in this process on a
Valkey of its own. Then the same workers renew their leases and stand in for a Manager that does not exist. The table
shows commands and bytes a second at the server, and this process's CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis.asyncio
import uvloop
from rich.console import Console
from rich.table import Table

from broker import Broker, BrokerSettings
from broker.embedded.server import EmbeddedServer
from manager import ManagerService, ManagerSettings
from manager.core import ProbeResult, ProbeStatus
from manager.service import open_broker
from queue_schemas import EngineState, Heartbeat, Registration, SessionId, WorkerId, new_session_id
from telemetry import MetricsRegistry, configure_logging
from tests.support.waiting import eventually
from worker.fallback_sweeper import FallbackSweeper
from worker.metrics import WorkerMetrics

HEARTBEAT_S = 2.0
LEASE_S = 15.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one second of a scenario."""

    commands: float
    read_bytes: float
    written_bytes: float
    cpu: float


class NoProbe:
    """Probe nothing: every worker's state is unknown."""

    async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
        return ProbeResult(ProbeStatus.UNKNOWN)


async def measured(client: redis.asyncio.Redis, seconds: float) -> Cost:
    """The cost of everything that runs for ``seconds``."""
    before, cpu, began = await client.info(), time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    after, took = await client.info(), time.monotonic() - began
    return Cost(
        (after["total_commands_processed"] - before["total_commands_processed"]) / took,
        (after["total_net_output_bytes"] - before["total_net_output_bytes"]) / took,
        (after["total_net_input_bytes"] - before["total_net_input_bytes"]) / took,
        (time.process_time() - cpu) / took,
    )


def status_of(session_id: SessionId) -> dict[str, Any]:
    return {
        "session_id": session_id, "models": ["sim"], "slots": 64, "running": random.randrange(64),
        "engine": EngineState.READY, "broker_ok": True,
    }  # fmt: skip


async def heartbeats(url: str, client: redis.asyncio.Redis, workers: int, seconds: float) -> Cost:
    """Workers that send heartbeats to a Manager."""
    settings = BrokerSettings(redis_url=url)
    service = ManagerService(ManagerSettings.load(), open_broker(settings), NoProbe(), broker_url=url)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await eventually(lambda: service.acting, "it acts")
    names = {f"w-{number}": new_session_id(f"w-{number}") for number in range(workers)}
    for name, session_id in names.items():
        await service.register(Registration(worker_id=name, version="bench", **status_of(session_id)))

    async def send_heartbeats(name: str, session_id: SessionId) -> None:
        await asyncio.sleep(random.uniform(0, HEARTBEAT_S))
        while True:
            await service.heartbeat(name, Heartbeat(**status_of(session_id)))
            await asyncio.sleep(HEARTBEAT_S)

    senders = [asyncio.create_task(send_heartbeats(name, session_id)) for name, session_id in names.items()]
    await asyncio.sleep(HEARTBEAT_S)
    cost = await measured(client, seconds)
    for task in senders:
        task.cancel()
    stop.set()
    await running
    return cost


async def alone(url: str, client: redis.asyncio.Redis, workers: int, seconds: float) -> Cost:
    """Workers that renew their leases while no Manager acts."""
    broker = await Broker.connect(BrokerSettings(redis_url=url))
    metrics = WorkerMetrics(MetricsRegistry("worker"))
    names = [new_session_id(f"w-{number}") for number in range(workers)]
    await asyncio.gather(*map(broker.workers.join, names))

    async def renew(name: SessionId) -> None:
        await asyncio.sleep(random.uniform(0, LEASE_S / 5))
        while True:
            await broker.workers.renew(name)
            await asyncio.sleep(LEASE_S / 5)

    tasks = [asyncio.create_task(renew(name)) for name in names]
    tasks += [asyncio.create_task(FallbackSweeper(broker, name, metrics, LEASE_S).run()) for name in names]
    await asyncio.sleep(LEASE_S * 1.5)
    cost = await measured(client, seconds)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    await broker.close()
    return cost


async def run(workers: int, seconds: float) -> None:
    table = Table("scenario", "commands/s", "read kB/s", "written kB/s", "CPU", title=f"{workers} workers")
    with tempfile.TemporaryDirectory() as folder:
        for name, scenario in (("heartbeats", heartbeats), ("no Manager", alone)):
            async with EmbeddedServer(Path(folder) / name.replace(" ", "-")) as server:
                client = redis.asyncio.Redis.from_url(server.url)
                cost = await scenario(server.url, client, workers, seconds)
                await client.aclose()
            table.add_row(
                name,
                f"{cost.commands:,.0f}",
                f"{cost.read_bytes / 1000:,.0f}",
                f"{cost.written_bytes / 1000:,.0f}",
                f"{cost.cpu:.2f}",
            )
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args(argv)
    configure_logging("bench", "error")
    uvloop.run(run(args.workers, args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
