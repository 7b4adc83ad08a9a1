"""`inferq ray up | status | down`, as a shell calls them, on a real cluster."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import stat
from pathlib import Path

import aiohttp
import pytest

from queue_schemas import new_session_id
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(400)


async def test_the_fabric_in_ray_serves_and_says_how_it_is(ray_cluster: RayCluster, ray_fleet: Fleet) -> None:
    """A worker that knows only the way in serves a client that knows only it; status says that all is well."""
    await ray_fleet.worker("worker-1").start()
    await ray_fleet.until_served(1)
    question = {"model": "sim", "messages": [{"role": "user", "content": "hello there"}]}
    async with ray_fleet.session.post(f"{ray_cluster.url}/v1/chat/completions", json=question) as answer:
        assert answer.status == 200, await answer.text()
        assert (await answer.json())["choices"][0]["message"]["content"] == "hello there"
    done = ray_cluster.inferq("ray", "status", "--json")
    status = json.loads(done.stdout)
    assert (done.returncode, status["healthy"], status["url"]) == (0, True, ray_cluster.url)
    assert status["manager"]["acting"]
    assert status["application"]["replicas"] == {"RUNNING": 2}
    people = ray_cluster.inferq("ray", "status")
    assert people.returncode == 0
    assert f"{ray_cluster.url}/v1  (2 running)" in people.stdout


async def test_figures_and_request_ids_are_where_rays_are(ray_cluster: RayCluster, ray_fleet: Fleet) -> None:
    """Ray's own metrics page shows ours, of Routers and Manager; the logs of the replica that took a registration and
    of the actor that answered it carry its id."""
    asked = {"x-request-id": "registration-that-is-followed"}
    joining = {"worker_id": "somebody", "session_id": str(new_session_id("somebody")), "models": [], "slots": 1}
    async with ray_fleet.session.post(f"{ray_cluster.url}/fabric/v1/workers", json=joining, headers=asked) as answer:
        assert answer.status == 200, await answer.text()

    def lines() -> list[dict[str, object]]:
        found = [line for line in ray_cluster.output().splitlines() if asked["x-request-id"] in line]
        return [json.loads(line) for line in found]

    await eventually(lambda: len(lines()) >= 2, "both have written of it", limit_s=10)
    assert {line["event"]: line["role"] for line in lines()} == {
        "forwarded_to_manager": "router",
        "worker_joined": "manager",
    }

    port = await asyncio.to_thread(ray_cluster.ask, "answer = ray.nodes()[0]['MetricsExportPort']")

    async def shown() -> bool:
        async with ray_fleet.session.get(f"http://127.0.0.1:{port}/metrics") as page:
            text = await page.text()
        manager = re.search(r"^ray_inferq_manager_acting\{.*\} 1\.0$", text, re.MULTILINE)
        router = re.search(r'^ray_inferq_requests_total\{.*path="/fabric/v1/workers".*\} [1-9]', text, re.MULTILINE)
        return bool(manager and router)

    await eventually(shown, "Ray's page shows our figures", limit_s=40, every_s=0.5)
    leaving = f"{ray_cluster.url}/fabric/v1/workers/somebody?session_id={joining['session_id']}"
    async with ray_fleet.session.delete(leaving) as answer:
        assert answer.status == 204


def test_the_cluster_is_guarded_and_stays_on_loopback(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Nothing of it listens elsewhere but Serve's ports between replicas, which Ray binds so and guards by the token;
    without the token nobody is let in; nobody else reads the token."""
    inodes = _sockets_of([pid for pid in ray_cluster.processes() if pid not in ray_cluster.replicas()])
    hosts = {host for host, inode in _listening() if inode in inodes}
    assert hosts
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    mode = stat.S_IMODE((ray_cluster.data_dir / "ray-token").stat().st_mode)
    assert mode == 0o600
    env = {**ray_cluster.driver_env, "RAY_AUTH_MODE": "disabled", "INFERQ_RAY_CONNECT_LIMIT_MS": "4000"}
    refused = ray_cluster.inferq(
        *("ray", "status", "--address", ray_cluster.address, "--data-dir", str(tmp_path)), env=env
    )
    assert refused.returncode == 2, refused.stdout
    assert "did not let this process in" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr


async def test_up_again_changes_nothing(ray_cluster: RayCluster) -> None:
    """The same settings, the same processes."""
    before = sorted(ray_cluster.processes("ray::"))
    said = ray_cluster.up()
    assert said["changed"] == []
    assert said["ready"]
    assert sorted(set(before) & set(ray_cluster.processes("ray::"))) == before


def test_an_outsider_at_the_address_is_not_waited_for(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """What listens there is no head: one sentence, within the limit."""
    with socket.socket() as outsider:
        outsider.bind(("127.0.0.1", 0))
        outsider.listen()
        address = f"127.0.0.1:{outsider.getsockname()[1]}"
        other = {**ray_cluster.env, "INFERQ_RAY_CONNECT_LIMIT_MS": "2000"}
        done = ray_cluster.inferq(
            *("ray", "status", "--address", address, "--data-dir", str(tmp_path)), env=other, limit_s=60
        )
    assert done.returncode == 2
    assert f"the Ray cluster at {address} did not let this process in within 2 s" in done.stderr


async def test_an_update_that_cannot_start_says_why_and_leaves_the_old_routers(ray_cluster: RayCluster) -> None:
    """The port is taken: the replicas' own sentence, within the limit, and the way in serves on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ray_cluster.inferq("ray", "up", "--port", str(port))
    assert done.returncode == 2, done.stdout
    assert f"port {port} on 127.0.0.1 is taken by another process" in done.stderr
    async with aiohttp.ClientSession() as session, session.get(f"{ray_cluster.url}/readyz") as answer:
        assert answer.status == 200


def _sockets_of(pids: list[int]) -> set[str]:
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(entry.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def _listening() -> list[tuple[str, str]]:
    """Address and inode of every listening TCP socket: proc_net(5)."""
    found = []
    for name, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A":
                continue
            raw = bytes.fromhex(fields[1].partition(":")[0])
            words = b"".join(raw[at : at + 4][::-1] for at in range(0, size, 4))
            found.append((socket.inet_ntop(family, words), fields[9]))
    return found
