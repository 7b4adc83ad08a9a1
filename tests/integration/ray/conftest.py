"""One Ray cluster with the fabric in it for all tests of this folder: a head takes its time to start."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet
from tests.support.processes import is_alive
from tests.support.ray_cluster import RayCluster
from tests.support.servers import Server, server_binary


@pytest.fixture(scope="session")
def ray_queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The Valkey of the cluster's fabric."""
    with Server(server_binary(), tmp_path_factory.mktemp("ray-queue")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, ray_queue: Server) -> Iterator[RayCluster]:
    """The cluster, up. A test that takes the fabric down or changes it puts it back with ``up()``.

    Its end is a test too: ``inferq ray down`` leaves no process, nor its record, and may be repeated.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'inferq[ray]')")
    cluster = RayCluster(tmp_path_factory.mktemp("ray"), ray_queue)
    try:
        cluster.up()
        yield cluster
        everything = cluster.processes()
        done = cluster.inferq("ray", "down")
        assert done.returncode == 0, done.stderr
        assert [pid for pid in everything if is_alive(pid)] == []
        assert not (cluster.data_dir / "ray.json").exists()
        assert cluster.inferq("ray", "down").stdout == "Nothing of ours runs.\n"
    finally:
        cluster.down()


@pytest.fixture
async def ray_fleet(tmp_path: Path, ray_cluster: RayCluster) -> AsyncIterator[Fleet]:
    """Workers of this test alone on the cluster's queue, none started yet. ``fleet.router`` is the cluster's way in,
    not a process of its own; ``fleet.manager`` may be started, as the Manager of the other topology."""
    async with Fleet(tmp_path, ray_cluster.server) as fleet:
        fleet.router.url = ray_cluster.url
        yield fleet
