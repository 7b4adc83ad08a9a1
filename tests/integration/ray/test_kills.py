"""Manager and Router in Ray are killed and replaced under traffic."""

from __future__ import annotations

import pytest

from tests.runs.kills import kill, serve_ray
from tests.runs.report import steps_of, table
from tests.runs.topologies import add_workers
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.ray_fabric import RayFabric
from tests.support.traffic import Traffic


@pytest.mark.timeout(300)
async def test_kills_and_updates_meet_only_what_the_killed_one_held(ray_cluster: RayCluster, ray_fleet: Fleet) -> None:
    """The Manager is SIGKILLed and killed through Ray, a replica is SIGKILLed, then all replicas are replaced by a
    changed setting: nothing fails but requests on connections of the killed replica, nothing is mixed up, no stream
    has a gap. The Manager acts again with the same workers in the same life; Serve brings the replica back."""
    async with RayFabric(ray_cluster) as ray:
        add_workers(ray_fleet, ray)
        await serve_ray(ray_fleet, ray)
        async with Traffic([ray.url], clients=6, long_cells=150, pause_s=0.1) as traffic:
            held, _took = await kill(ray, traffic, dwell_s=0.5)
        steps = steps_of(traffic, [held])
        print(table(steps))
        assert traffic.wrong(held) == []
        assert held.ports, "the killed replica held nothing: the test has proved nothing"
        assert all(step.streams_across for step in steps[1:-1]), "a step met no stream"
