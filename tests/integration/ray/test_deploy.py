"""The way of others to the same fabric: Serve's own command and a config file."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.runs.kills import serve_ray
from tests.runs.topologies import add_workers
from tests.support.fleet import Fleet
from tests.support.ray_cluster import ROOT, RayCluster
from tests.support.ray_fabric import RayFabric
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(400)
WAIT_LIMIT_S = 90.0


async def test_serve_deploy_takes_the_config_file_and_scales(
    ray_cluster: RayCluster, ray_fleet: Fleet, tmp_path: Path
) -> None:
    """deploy/ray/serve.yaml, with this cluster's port, in place of what runs; `inferq ray status` knows it. Serve then
    follows the open requests, which it does not see itself: many streams, more replicas; none, as many as at least, and
    no stream was cut off. The file's workers run, too, until the fabric leaves."""
    before = ray_cluster.replicas()
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    (application,) = config["applications"]
    application["args"] |= {"port": ray_cluster.port, "min_replicas": 1}
    application["args"] |= {"target_open_requests": 3, "up_delay_ms": 0, "down_delay_ms": 0}
    application["args"] |= {"model": "of-the-file", "cpus_per_worker": 0, "worker_args": "--engine sim --slots 3"}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "-a", ray_cluster.dashboard_url],
        env=ray_cluster.driver_env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    def replaced() -> bool:
        status = ray_cluster.status()
        return status["healthy"] and status["application"]["replicas"] == {"RUNNING": 1}

    await eventually(replaced, "the replica of the config file runs alone", limit_s=90, every_s=0.5)
    [worker] = ray_cluster.status()["workers"]
    assert (worker["pool"], worker["state"]) == ("of-the-file", "ready")
    assert not set(before) & set(ray_cluster.replicas())

    async with RayFabric(ray_cluster) as ray:
        add_workers(ray_fleet, ray)
        await serve_ray(ray_fleet, ray)
        async with Traffic([ray.url], clients=8, long_cells=600) as traffic:
            await eventually(lambda: len(ray.replicas()) > 1, "more replicas listen", limit_s=WAIT_LIMIT_S)
            await traffic.answered(5)
        assert traffic.wrong() == []
        await eventually(lambda: len(ray_cluster.replicas()) == 1, "one replica is left", limit_s=WAIT_LIMIT_S)
        refused = await asyncio.to_thread(ray_cluster.inferq, "ray", "up", "--port", str(ray_cluster.port))
        assert refused.returncode == 2
        assert "come from a Serve config file" in refused.stderr
        await ray.leave()
        await ray.up()
