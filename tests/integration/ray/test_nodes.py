"""`inferq ray up --workers` on several nodes: workers where there is room, and what is lost with a node."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from queue_schemas import FABRIC_PREFIX, JOIN_TOKEN_HEADER
from tests.support.processes import is_alive
from tests.support.ray_nodes import RayNodes, command_line
from tests.support.servers import Server, server_binary
from tests.support.sockets import held_by, listeners
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(300)
LIMIT_S = 60.0
TOKEN = "the-fleets-join-token"
WITH_GPU = {"num_cpus": 2, "num_gpus": 1}
POOL = ("--model", "sim", "--gpus-per-worker", "1")
ENGINE = ("--", "--engine", "sim", "--sim-mode", "echo", "--sim-tokens-per-s", "200", "--slots", "2")
MANAGER, REPLICA, AUTOSCALER, WORKER = "ray::ManagerActor", "ray::ServeReplica", "ray::PoolActor", "inferq worker"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head without GPUs, and two nodes with one each, with a queue of their own."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("nodes")
    variables = {
        "INFERQ_JOIN_TOKEN": TOKEN,
        "INFERQ_AUTOSCALE_INTERVAL_MS": "200",
        "INFERQ_AUTOSCALE_TARGET_WAIT": "50ms",
    }
    with (
        Server(server_binary(), folder / "queue") as queue,
        RayNodes(folder, queue, [{"num_cpus": 2}, WITH_GPU, WITH_GPU], **variables) as cluster,
    ):
        try:
            yield cluster
        finally:
            print(cluster.logs())


async def registered(url: str) -> dict[str, str]:
    """The sessions of the workers that take work, by id; empty while no Manager acts."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{url}{FABRIC_PREFIX}/workers", headers={JOIN_TOKEN_HEADER: TOKEN}) as answer,
        ):
            found: list[Any] = (await answer.json())["workers"] if answer.status == 200 else []
    except (aiohttp.ClientError, OSError, TimeoutError):
        return {}
    return {one["worker_id"]: one["session_id"] for one in found if one["state"] == "active"}


async def ready(nodes: RayNodes, count: int) -> dict[str, str]:
    """The sessions of the workers, once there are so many."""

    async def found() -> dict[str, str] | None:
        workers = await registered(nodes.url)
        return workers if len(workers) == count else None

    return await eventually(found, f"{count} workers serve", limit_s=LIMIT_S, every_s=0.1) or {}


async def up(nodes: RayNodes, *arguments: str) -> dict[str, Any]:
    return await asyncio.to_thread(nodes.up, "--min-replicas", "3", *arguments)


async def test_up_brings_the_workers_to_what_it_is_told(nodes: RayNodes) -> None:
    """To a number, and changes nothing the second time; to other settings one by one and to more as the queue asks,
    while clients are served."""
    said = await up(nodes, *POOL, "--workers", "1", *ENGINE, "--slots", "3")
    assert said["changed"] == ["Manager started", "Router started", "workers of sim: 1"]
    [first] = said["workers"]
    assert (first["state"], said["healthy"]) == ("ready", True)
    again = await up(nodes, *POOL, "--workers", "1", *ENGINE, "--slots", "3")
    assert (again["changed"], again["workers"]) == ([], [first])
    assert not any(TOKEN in command_line(pid) for pid in nodes.processes())

    async with Traffic([nodes.url], clients=8, long_cells=100) as traffic:
        await traffic.streaming()
        told = await up(nodes, *POOL, "--workers", "1", "--max-workers", "2", *ENGINE)
        assert told["changed"] == ["workers of sim: 1 to 2, replaced one by one"]
        assert first["worker_id"] not in {worker["worker_id"] for worker in told["workers"]}
        await ready(nodes, 2)
        await traffic.answered(5)
    assert traffic.wrong() == []


async def test_a_node_dies_under_load(nodes: RayNodes) -> None:
    """With a worker, the Manager's actor and Router replicas on it: no request fails but those on the connections that
    these replicas held themselves. The worker waits for a place, which is said, and comes up on a node that joins.
    Killed processes of a worker and of the autoscaler come back. A node that leaves costs no request at all."""
    before = await up(nodes, *POOL, "--workers", "2", *ENGINE)
    places = {worker["worker_id"]: worker["place"] for worker in before["workers"]}
    assert len({place["node_id"] for place in places.values()}) == 2, "one on each node that has a GPU"
    sessions = await ready(nodes, 2)
    replicas = [pid for pid in nodes.processes(REPLICA) if nodes.port in listeners(pid)]
    assert len({nodes.node_of(pid) for pid in replicas}) > 1, "the Routers of several nodes answer"

    daemons = {nodes.node_of(place["pid"]): worker_id for worker_id, place in places.items()}
    victim = await manager_beside_a_worker(nodes, daemons)
    lost = daemons[victim]
    number = 1 + sorted(daemons).index(victim)  # nodes are started one after the other

    async with Traffic([nodes.url], clients=6, long_cells=100) as traffic:
        await traffic.streaming()
        doomed = [pid for pid in replicas if nodes.node_of(pid) == victim]
        for pid in doomed:
            os.kill(pid, signal.SIGSTOP)  # from now on it accepts nothing more
        held = [held_by(pid, nodes.port) for pid in doomed]
        await asyncio.to_thread(nodes.remove, number)
        assert not is_alive(victim)

        async def another_acts() -> bool:
            return set(await registered(nodes.url)) == set(sessions) - {lost}

        await eventually(another_acts, "another Manager has declared the worker dead", limit_s=LIMIT_S, every_s=0.1)
        await traffic.answered(10)
        waiting = await eventually(lambda: pending(nodes), "a worker waits for a place", limit_s=LIMIT_S)
        assert "with 1 CPU and 1 GPU each; free on the nodes: " in waiting
        await asyncio.to_thread(nodes.add, WITH_GPU)
        after = await ready(nodes, 2)
        assert set(after) == set(sessions)
        assert after[lost] != sessions[lost]
        await traffic.answered(10)
    assert traffic.wrong(*held) == []

    [autoscaler] = nodes.processes(AUTOSCALER)
    for pid in (nodes.processes(WORKER)[0], autoscaler):
        os.kill(pid, signal.SIGKILL)

    async def again() -> bool:
        now = await registered(nodes.url)
        return set(now) == set(after) and now != after

    await eventually(again, "the killed worker process is started again", limit_s=LIMIT_S, every_s=0.1)
    await eventually(
        lambda: set(nodes.processes(AUTOSCALER)) - {autoscaler}, "the killed autoscaler is, too", limit_s=LIMIT_S
    )
    [other] = set(sessions) - {lost}
    async with Traffic([nodes.url], clients=4, long_cells=50) as traffic:
        await traffic.streaming()
        left = await asyncio.to_thread(nodes.inferq, "leave", "--node", places[other]["node_id"])
        assert (left.returncode, left.stdout) == (0, "The node can go.\n"), left.stderr
        await traffic.answered(5)
    assert traffic.wrong() == []
    assert set(await registered(nodes.url)) == {lost}, "there is no place for another"

    done = await asyncio.to_thread(nodes.inferq, "down")
    assert (done.returncode, done.stdout) == (0, "The fabric is out of Ray. The cluster runs on.\n"), done.stderr
    assert done.stderr.index(" worker") < done.stderr.index("the Router") < done.stderr.index("the Manager")
    assert nodes.processes(WORKER) == []


def pending(nodes: RayNodes) -> str:
    """What `inferq ray status` says of the workers that wait for a place."""
    status = nodes.status()
    if "pending" not in {worker["state"] for worker in status["workers"]}:
        return ""
    return next((reason for pool in status["pools"] for reason in pool["why_not"] if "for a place" in reason), "")


async def manager_beside_a_worker(nodes: RayNodes, daemons: dict[int, str]) -> int:
    """The node of a worker on which the Manager runs: it is killed until Ray has it there."""

    def found() -> int:
        for manager in nodes.processes(MANAGER):
            if (node := nodes.node_of(manager)) in daemons:
                return node
            os.kill(manager, signal.SIGKILL)
        return 0

    return await eventually(found, "the Manager runs beside a worker", limit_s=LIMIT_S, every_s=0.2)
