"""The server of the queue dies under load and another takes over: clients wait, and every answer is right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_schemas import shard_of_pool
from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet
from tests.support.queue import live_counts
from tests.support.servers import Cluster, Sentinel, Server, server_binary
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

KEYS = ShardKeys(0)


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Sentinel]:
    """A primary, a replica and their Sentinel."""
    binary = server_binary("redis")
    sentinel = Sentinel(binary, tmp_path / "queue")
    try:
        yield sentinel.start()
    finally:
        sentinel.stop()


def events(server: Server) -> dict[str, int]:
    """How many jobs were taken in, ended, ... by a server's account."""
    found: dict[str, int] = {}
    for field, number in server.ask("HGETALL", KEYS.counters).items():
        event = field.decode().rpartition(":")[2]
        found[event] = found.get(event, 0) + int(number)
    return found


async def until_drained(server: Server, keys: ShardKeys = KEYS) -> None:
    """Wait until nothing waits, runs, or takes room on a shard any more."""

    def drained() -> bool:
        left = server.ask("EXISTS", keys.budget, f"{keys.prefix}deadlines", f"{keys.prefix}lost")
        if left or live_counts(server.ask("HGETALL", keys.counters)):
            return False
        return bool(server.ask("KEYS", f"{keys.prefix}leases:*") == [])

    await eventually(drained, "the queue is empty", limit_s=20, every_s=0.2)


async def test_a_failover_that_loses_writes_costs_no_request(tmp_path: Path, sentinel: Sentinel) -> None:
    """The primary is killed in the middle of streams and plain requests, and the replica that Sentinel promotes lacks
    its latest writes: what was taken in, started, answered then. Everything is answered once and right all the same,
    new requests are served, and nothing stays behind in the queue."""
    primary, replica = sentinel.primary, sentinel.replica
    async with Fleet(tmp_path, primary, manager={"redis_url": sentinel.url}) as fleet:
        await fleet.up(workers=2, slots=6)
        before = {worker["session_id"] for worker in (await fleet.manager.page("/fabric/v1/workers"))["workers"]}
        async with Traffic([fleet.router.url], clients=16) as traffic:
            await traffic.streaming()
            sentinel.cut_replication()
            await traffic.answered(40)
            await traffic.streaming()
            known = events(primary)
            primary.kill()
            await asyncio.to_thread(sentinel.until_promoted)
            promoted = events(replica)
            traffic.step("promoted")
            await traffic.answered(100)
        assert traffic.wrong() == []
        lost = {event: number - promoted.get(event, 0) for event, number in known.items()}
        assert lost["enqueued"] > 0
        assert lost["done"] > 0
        await until_drained(replica)
        after = {worker["session_id"] for worker in (await fleet.manager.page("/fabric/v1/workers"))["workers"]}
        assert after == before, "no worker was declared dead"


async def test_a_node_of_a_cluster_fails_over_and_another_restarts(tmp_path: Path) -> None:
    """Two shards on two nodes of three: one is killed and its replica takes over, the other is killed and comes back.
    Every stream and plain request of both is answered once and right."""
    binary = server_binary()
    # Shard 0 lies on the third node (slot 13907), shard 1 on the second (slot 9842).
    cluster = Cluster(binary, tmp_path / "queue", replicated=2)
    models = [
        "sim",
        next(name for name in map("sim-{}".format, range(9)) if shard_of_pool(name, 2) != shard_of_pool("sim", 2)),
    ]
    try:
        cluster.start()
        async with Fleet(tmp_path, cluster.nodes[0], manager={"redis_url": cluster.url, "shards": 2}) as fleet:
            roles = [
                fleet.manager,
                fleet.router,
                *(fleet.worker(f"w-{n}", model=m, slots=6) for n, m in enumerate(models)),
            ]
            for role in roles:
                role.process.start()
            await asyncio.gather(*(role.ready() for role in roles))
            for model in models:
                await fleet.until_served(1, model)
            async with (
                Traffic([fleet.router.url], clients=6) as one,
                Traffic([fleet.router.url], clients=6, model=models[1]) as other,
            ):
                for traffic in (one, other):
                    await traffic.streaming()
                cluster.nodes[2].kill()
                await asyncio.to_thread(cluster.until_promoted)
                for traffic in (one, other):
                    await traffic.answered(30)
                    await traffic.streaming()
                await asyncio.to_thread(cluster.nodes[1].restart)
                for traffic in (one, other):
                    await traffic.answered(30)
            assert one.wrong() + other.wrong() == []
            assert cluster.replica is not None
            await until_drained(cluster.replica, ShardKeys(0))
            await until_drained(cluster.nodes[1], ShardKeys(1))
    finally:
        cluster.stop()
