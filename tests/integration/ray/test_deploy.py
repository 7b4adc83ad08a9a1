"""The ways of others to the same fabric: Serve's own command and a config file, and a cluster that is not ours."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.ray_cluster import ROOT, RayCluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(400)


async def test_serve_deploy_takes_the_config_file(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """deploy/ray/serve.yaml, with this cluster's port, in place of what runs; `inferq ray status` knows it."""
    before = ray_cluster.replicas()
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    (application,) = config["applications"]
    application["args"] |= {"port": ray_cluster.port, "min_replicas": 1}
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
    assert not set(before) & set(ray_cluster.replicas())


def test_down_from_elsewhere_leaves_the_cluster(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Who has not started the cluster takes the fabric out of it and no more."""
    elsewhere = ("--address", ray_cluster.address, "--data-dir", str(tmp_path))
    done = ray_cluster.inferq("ray", "down", *elsewhere, env=ray_cluster.driver_env)
    assert (done.returncode, done.stdout) == (0, "The fabric is out of Ray. The cluster runs on.\n"), done.stderr
    status = ray_cluster.status()
    assert (status["manager"], status["application"]) == (None, None)
    assert ray_cluster.processes("ray::ManagerActor") == []
    assert len(ray_cluster.processes()) > 5
    assert ray_cluster.up()["ready"]
