"""``inferq autoscale --driver ray``: workers as actors of a real cluster, from none and back to none."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.fleet import Fleet
from tests.support.processes import Child
from tests.support.ray_cluster import RayCluster
from tests.support.waiting import eventually

MODEL = "on-ray"
REQUESTS = 12


def autoscaler(cluster: RayCluster, folder: Path) -> Child:
    rules = {"pool": MODEL, "max": 2, "worker-slots": 4, "scale-in-after": "1s", "interval-ms": 200, "port": 0}
    rules |= {"driver": "ray", "ray-cpus": 0, "manager-url": cluster.url}
    flags = [part for flag, value in rules.items() for part in (f"--{flag}", str(value))]
    worker = ["--engine", "sim", "--slots", "4", "--sim-mode", "echo", "--sim-ttft-ms", "100"]
    args = [sys.executable, "-m", "inferq", "autoscale", *flags, "--", *worker]
    env = cluster.env | {"INFERQ_DATA_DIR": str(cluster.data_dir)}
    return Child("autoscaler", args, folder / "autoscaler.log", env=env, cwd=folder)


@pytest.mark.timeout(300)  # alone it also waits for the cluster's start and end
async def test_workers_come_as_actors_and_go_again(ray_fleet: Fleet, ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Every request that waited for them is answered. The next autoscaler finds the workers of a killed one."""
    child = autoscaler(ray_cluster, tmp_path)
    child.start()
    url = ray_cluster.url

    async def ask(number: int) -> str:
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"request {number}"}]}
        async with ray_fleet.session.post(f"{url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["choices"][0]["message"]["content"])

    async def listed() -> bool:
        return MODEL in [one["id"] for one in (await ray_fleet.router.page("/v1/models"))["data"]]

    async def workers(count: int) -> bool:
        return bool((await ray_fleet.depth(MODEL))["workers"] == count)

    try:
        await eventually(listed, "the pool is listed at zero workers", limit_s=40)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(number)) for number in range(REQUESTS)]
            await eventually(lambda: workers(2), "two workers come", limit_s=60)
            assert len(ray_cluster.processes("ray::WorkerActor")) == 2
            child.kill()
        assert [task.result() for task in asked] == [f"request {number}" for number in range(REQUESTS)]
        child.start()
        await eventually(lambda: workers(0), "they go again", limit_s=60)
        await eventually(lambda: not ray_cluster.processes("ray::WorkerActor"), "their actors have ended", limit_s=30)
        child.send(signal.SIGTERM)
        await eventually(lambda: not child.running, "the autoscaler ends", limit_s=20)
        assert child.returncode == 0
    except BaseException:
        print(child.log_tail(40))
        raise
    finally:
        child.kill()
