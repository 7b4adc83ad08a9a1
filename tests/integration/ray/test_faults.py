"""What may go wrong around a fabric in Ray, each with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from queue_schemas import FABRIC_PREFIX, JOIN_TOKEN_HEADER
from tests.integration.membership.test_clocks import HOUR_S, FleetWithClocks
from tests.runs.kills import serve_ray
from tests.runs.moving import stands_by
from tests.runs.topologies import add_workers
from tests.support.fleet import Fleet
from tests.support.ray_cluster import RayCluster
from tests.support.ray_fabric import CONTROLLER, MANAGER, RayFabric
from tests.support.sockets import held_by
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(300)
WAIT_LIMIT_S = 60.0
TOKEN = "the-right-token"


@pytest.fixture
async def ray(ray_cluster: RayCluster) -> AsyncIterator[RayFabric]:
    """The cluster, watched."""
    async with RayFabric(ray_cluster) as fabric:
        yield fabric


@contextmanager
def settings(cluster: RayCluster, **given: str) -> Iterator[None]:
    """Environment of the cluster's next `up`; put back, not undone: that is another `up`."""
    before = dict(cluster.env)
    cluster.env.update(given)
    try:
        yield
    finally:
        cluster.env.clear()
        cluster.env.update(before)


async def test_serves_controller_dies_and_nobody_notices(ray: RayFabric, ray_fleet: Fleet) -> None:
    """Clients talk to replicas, not to Serve: its controller is SIGKILLed, comes back, knows its replicas again, and
    all is well, with the same replicas and no failed request."""
    add_workers(ray_fleet, ray)
    await serve_ray(ray_fleet, ray)
    replicas = set(ray.replicas())
    async with Traffic([ray.url], clients=6, long_cells=100) as traffic:
        await traffic.streaming()
        (controller,) = ray.cluster.processes(CONTROLLER)
        os.kill(controller, signal.SIGKILL)

        def another() -> bool:
            return bool(set(ray.cluster.processes(CONTROLLER)) - {controller})

        await eventually(another, "Serve has another controller", limit_s=WAIT_LIMIT_S, every_s=0.1)

        async def well() -> bool:
            return bool((await ray.status())["healthy"])

        await eventually(well, "all is well again", limit_s=WAIT_LIMIT_S)
        await traffic.answered(20)
    assert traffic.wrong() == []
    assert set(ray.replicas()) == replicas


async def test_a_hung_replica_is_replaced(ray: RayFabric, ray_fleet: Fleet) -> None:
    """A replica is stopped, not dead: it accepts nothing more, so new connections are served by the other, and Serve's
    health check finds it out and starts another one."""
    add_workers(ray_fleet, ray, 1)
    await serve_ray(ray_fleet, ray)
    before = ray.replicas()
    hung = before[0]
    os.kill(hung, signal.SIGSTOP)
    try:
        held = held_by(hung, ray.port)
        async with Traffic([ray.url], clients=3, long_cells=50) as traffic:
            await eventually(
                lambda: len(set(ray.cluster.replicas()) - set(before)) >= 1,
                "Serve has started another replica",
                limit_s=WAIT_LIMIT_S,
                every_s=0.2,
            )
            await traffic.answered(10)
        assert traffic.wrong(held) == []
    finally:
        if hung in ray.cluster.replicas():
            os.kill(hung, signal.SIGKILL)
    await eventually(lambda: len(ray.replicas()) >= len(before), "as many listen again", limit_s=WAIT_LIMIT_S)


async def test_two_managers_and_either_dies(tmp_path: Path, ray: RayFabric) -> None:
    """The HTTP Manager stands by beside the actor and says so; the actor is killed and the other acts, the new actor
    stands by; that one is killed and the actor acts. The workers, one with a clock that is an hour off, keep their
    lives all the while."""
    async with FleetWithClocks(tmp_path, ray.cluster.server) as fleet:
        urls = f"{ray.url},{fleet.manager.url}"
        fleet.worker("worker-1", manager_url=urls)
        fleet.worker_off_by(HOUR_S, "ahead").process.args += ["--manager-url", urls]
        await serve_ray(fleet, ray)
        workers = await ray.acting()
        assert workers is not None
        assert set(workers) == {"worker-1", "ahead"}

        fleet.manager.process.start()
        await eventually(lambda: stands_by(fleet.manager), "the HTTP Manager stands by", limit_s=WAIT_LIMIT_S)
        killed = {0}

        async def http_acts() -> bool:
            status, body = await fleet.manager.get(f"{FABRIC_PREFIX}/workers")
            page = json.loads(body) if status == 200 else {}
            if page.get("manager"):
                return {one["worker_id"]: one["session_id"] for one in page["workers"]} == workers
            # Ray may start another actor before the lease of the killed one is over: whoever asks first then acts.
            for pid in set(ray.cluster.processes(MANAGER)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            return False

        await eventually(http_acts, "the HTTP Manager acts for the same workers", limit_s=WAIT_LIMIT_S, every_s=0.05)

        async def actor_stands_by() -> bool:
            manager = (await ray.status())["manager"]
            return not manager["acting"] and manager["pid"] not in killed

        await eventually(actor_stands_by, "another actor stands by", limit_s=WAIT_LIMIT_S)
        fleet.manager.process.kill()
        await ray.until_acting(workers, WAIT_LIMIT_S)


async def test_redis_away_at_the_start_and_a_wrong_join_token(ray: RayFabric, ray_fleet: Fleet) -> None:
    """Manager and Routers start without Redis: they are there, not ready, and say why; with Redis they get ready by
    themselves. Then a worker with a wrong join token is refused by the way in with one sentence and learns nothing."""
    old = set(ray.replicas())
    with settings(ray.cluster, INFERQ_JOIN_TOKEN=TOKEN, INFERQ_RAY_READY_LIMIT_MS="200"):
        ray.cluster.server.kill()
        try:
            told = await ray.up()
            assert not told["ready"]
            assert any("Redis" in reason for reason in told["not_ready"]), told
            assert any("Redis" in reason for reason in told["manager"]["not_ready"]), told
            status, page = await ray.page("/readyz")
            assert (status, page["ready"]) == (503, False)
            assert page["reasons"]
            assert not (await ray.status())["healthy"]
        finally:
            ray.cluster.server.start()
        await eventually(lambda: not old & set(ray.replicas()), "only new replicas listen", limit_s=WAIT_LIMIT_S)
        await eventually(lambda: _is_ready(ray), "the Router gets ready by itself", limit_s=WAIT_LIMIT_S)

        outsider = ray_fleet.worker("outsider", manager_url=ray.url, join_token="wrong")
        outsider.process.start()
        assert await outsider.ended(WAIT_LIMIT_S) == 2
        sentences = [line for line in outsider.process.log_text().splitlines() if line.startswith("inferq: ")]
        assert len(sentences) == 1
        assert "INFERQ_JOIN_TOKEN" in sentences[0]
        assert str(ray.cluster.server.port) not in outsider.process.log_text()
        wrong = {JOIN_TOKEN_HEADER: "wrong"}
        status, page = await ray.page(f"{FABRIC_PREFIX}/broker", headers=wrong)
        assert (status, page["error"]["code"]) == (401, "invalid_api_key")

        member = ray_fleet.worker("member", manager_url=ray.url, join_token=TOKEN)
        await member.start()
    told = await ray.up()
    assert told["ready"]


async def _is_ready(ray: RayFabric) -> bool:
    return (await ray.page("/readyz"))[0] == 200


async def test_a_client_that_leaves_frees_the_engine(ray: RayFabric, ray_fleet: Fleet) -> None:
    """It hangs up in the middle of a stream that a replica passes on: the worker's slot is free within a moment."""
    add_workers(ray_fleet, ray, 1)
    await serve_ray(ray_fleet, ray)
    text = "x" * 4 * 3_000  # at 50 tokens a second, left alone, a minute
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True}
    async with aiohttp.ClientSession() as session:

        async def served() -> bool:
            async with session.post(f"{ray.url}/v1/chat/completions", json=body) as answer:
                return answer.status == 200 and bool(await answer.content.readany())

        await eventually(served, "a stream has begun", limit_s=WAIT_LIMIT_S)

    async def idle() -> bool:
        return not (await ray_fleet.workers[0].page("/status"))["running"]

    await eventually(idle, "the slot is free", limit_s=10)


async def test_a_client_that_is_slow_gets_everything(ray: RayFabric, ray_fleet: Fleet) -> None:
    """A client that reads a few bytes at a time delays nobody, and its answer is whole."""
    add_workers(ray_fleet, ray, 1)
    await serve_ray(ray_fleet, ray)
    text = "".join(f"{number:07} " for number in range(40))
    body = json.dumps({"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", ray.port))
        await loop.sock_sendall(slow, head.encode() + body)
        async with Traffic([ray.url], clients=3, long_cells=20) as traffic:
            await traffic.answered(20)
        got = b""
        async with asyncio.timeout(WAIT_LIMIT_S):
            while piece := await loop.sock_recv(slow, 64):
                got += piece
    lines = [line for line in got.decode().splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines]
    assert "".join(pieces) == text
    assert traffic.wrong() == []


async def test_a_taken_port_of_ray_is_a_sentence(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """The head's port is somebody else's: `up` ends with code 2, names the flag, and leaves nothing behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ("--head-port", port, "--data-dir", str(tmp_path / "data"), "--redis-url", ray_cluster.server.url)
        done = await asyncio.to_thread(ray_cluster.inferq, "ray", "up", *flags)
    assert done.returncode == 2, done.stdout
    assert f"port {port} on 127.0.0.1 is taken by another process" in done.stderr
    assert "--head-port" in done.stderr
    assert not (tmp_path / "data" / "ray.json").exists()
