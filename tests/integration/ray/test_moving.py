"""A serving fleet moves from one topology to the other and back, and none of its clients notices."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.runs.moving import move, serve_http
from tests.runs.report import steps_of, table
from tests.runs.stage import add_workers
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.ray_fabric import RayFabric
from tests.support.servers import Server
from tests.support.traffic import Traffic


@pytest.mark.timeout(300)
async def test_a_serving_fleet_moves_into_ray_and_back(tmp_path: Path, own_valkey: Server) -> None:
    """HTTP -> Ray -> HTTP under mixed traffic, both topologies at once on one Redis, nothing restarted but what moves:
    no request fails, none is mixed up, every stream is gapless, and at every step streams are under way."""
    cluster = RayCluster(tmp_path, own_valkey)
    try:
        async with Fleet(tmp_path, own_valkey) as fleet, RayFabric(cluster) as ray:
            add_workers(fleet, ray)
            await serve_http(fleet)
            async with Traffic([fleet.router.url], clients=6, long_cells=150, pause_s=0.1) as traffic:
                await move(fleet, ray, traffic, dwell_s=0.5)
            steps = steps_of(traffic)
            print(table(steps))
            assert traffic.wrong() == []
            assert all(step.streams_across for step in steps[1:-1]), "a step met no stream"
            used = {asked.url for asked in traffic.history}
            assert used == {fleet.router.url, ray.url}
            again = await asyncio.to_thread(cluster.inferq, "ray", "down")
            assert (again.returncode, again.stdout) == (0, "Nothing of ours runs.\n")
    finally:
        await asyncio.to_thread(cluster.down)
