"""What a run plays on: a Redis of its own, the roles of the HTTP topology, and a Ray cluster, all on loopback."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from manager.settings import ManagerSettings
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.ray_fabric import RayFabric
from tests.support.servers import Server, server_binary

TOKENS_PER_S = 50
"""So that a long stream of 200 tokens takes four seconds."""
_TIMES = ("lease_ms", "heartbeat_interval_ms", "unresponsive_after_ms", "leader_lease_ms", "sweep_interval_ms")


@asynccontextmanager
async def open_topologies() -> AsyncIterator[tuple[Fleet, RayFabric]]:
    """Nothing started yet but Redis. All times are those of production, unlike in tests."""
    usual = {f"INFERQ_MANAGER_{name.upper()}": None for name in _TIMES} | {"INFERQ_RAY_LAME_DUCK_MS": None}
    times = {name: ManagerSettings.model_fields[name].default for name in _TIMES}
    with tempfile.TemporaryDirectory(prefix="inferq-run-") as name:
        folder = Path(name)
        server = Server(server_binary(), folder / "valkey").start()
        cluster = RayCluster(folder, server, env=usual)
        try:
            async with Fleet(folder, server, manager=times) as fleet, RayFabric(cluster) as ray:
                add_workers(fleet, ray)
                yield fleet, ray
        finally:
            await asyncio.to_thread(cluster.down)
            server.stop()


def add_workers(fleet: Fleet, ray: RayFabric, count: int = 2, **flags: object) -> None:
    """Workers that know both ways in; not started yet."""
    urls = f"{fleet.router.url},{ray.url}"
    for number in range(count):
        fleet.worker(f"worker-{number + 1}", manager_url=urls, sim_tokens_per_s=TOKENS_PER_S, **flags)


def parse_seconds(what: str | None) -> float:
    """``--seconds`` of a run's command line."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the fleet serves between the steps")
    seconds: float = parser.parse_args().seconds
    return seconds
