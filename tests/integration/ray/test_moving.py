"""A serving fleet moves from one topology to the other and back, and none of its clients notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.kills import serve_ray
from tests.runs.moving import into_http, into_ray
from tests.runs.report import steps_of, table
from tests.runs.topologies import add_workers
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.ray_fabric import RayFabric
from tests.support.traffic import Traffic


@pytest.mark.timeout(300)
async def test_a_serving_fleet_moves_out_of_ray_and_back(tmp_path: Path, ray_cluster: RayCluster) -> None:
    """Ray -> HTTP -> Ray under mixed traffic, both topologies at once on one Redis, nothing restarted but what moves:
    no request fails, none is mixed up, every stream is gapless, and at every step streams are under way."""
    async with Fleet(tmp_path, ray_cluster.server) as fleet, RayFabric(ray_cluster) as ray:
        add_workers(fleet, ray)
        await serve_ray(fleet, ray)
        pids = [worker.process.pid for worker in fleet.workers]
        async with Traffic([ray.url], clients=6, long_cells=150, pause_s=0.1) as traffic:
            await into_http(fleet, ray, traffic, 0.5, ray.leave)
            await into_ray(fleet, ray, traffic, 0.5)
            await traffic.answered(10)
        assert [worker.process.pid for worker in fleet.workers if worker.process.running] == pids
        steps = steps_of(traffic)
        print(table(steps))
        assert traffic.wrong() == []
        assert all(step.streams_across for step in steps[1:]), "a step met no stream"
        assert {asked.url for asked in traffic.history} == {fleet.router.url, ray.url}
