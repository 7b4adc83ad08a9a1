"""A server that stops being fit under a running fleet is noticed, said without addresses, and forgiven once mended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from broker import Broker, BrokerSettings
from broker.redis.health import FULL, REPLICA
from tests.support.servers import Cluster, Server, partial_cluster, server_binary

POLICY = "maxmemory-policy is allkeys-lru: Redis would evict waiting jobs; set maxmemory-policy noeviction"


@pytest.fixture(params=["valkey", "redis7"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server whose settings a test may change."""
    server = Server(server_binary(request.param), tmp_path).start()
    yield server
    server.stop()


@pytest.fixture
async def broker(server: Server) -> AsyncIterator[Broker]:
    """A broker that connected while the server was fit."""
    broker = await Broker.connect(BrokerSettings(redis_url=server.url, retry_limit_ms=300))
    yield broker
    await broker.close()


async def test_a_policy_that_evicts_is_noticed_and_forgiven(broker: Broker, server: Server) -> None:
    """[G6] A server switched to evicting keys is unfit, says a sentence with the remedy, until it is put right."""
    assert await broker.server_faults() == []
    server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert await broker.server_faults() == [POLICY]
    server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await broker.server_faults() == []


async def test_a_primary_that_was_made_a_replica_is_noticed(broker: Broker, server: Server, tmp_path: Path) -> None:
    """[G6] A primary that an operator or a failover demoted is a read-only replica, and said to be."""
    other = Server(server.binary, tmp_path / "other").start()
    try:
        server.ask("REPLICAOF", "127.0.0.1", str(other.port))
        assert await broker.server_faults() == [REPLICA]
        server.ask("REPLICAOF", "NO", "ONE")
        assert await broker.server_faults() == []
    finally:
        other.stop()


async def test_full_memory_and_missing_replicas_are_noticed(broker: Broker, server: Server) -> None:
    """[G6] A server that refuses writes, whatever for, is found by writing. Full memory is logged, and takes nobody
    out of service: running work still ends, and new work is refused by itself."""
    server.ask("CONFIG", "SET", "maxmemory", "1")
    with capture_logs() as lines:
        assert await broker.server_faults() == []
    assert [line["fault"] for line in lines if line["event"] == "queue_server_unhealthy"] == [FULL]
    server.ask("CONFIG", "SET", "maxmemory", "0")
    server.ask("CONFIG", "SET", "min-replicas-to-write", "1")
    (fault,) = await broker.server_faults()
    assert "refuses to be written to" in fault
    server.ask("CONFIG", "SET", "min-replicas-to-write", "0")
    assert await broker.server_faults() == []


async def test_a_server_that_is_gone_is_reported_without_its_address(broker: Broker, server: Server) -> None:
    """[G6] Whoever reads a health page learns that the server is away, not where it is."""
    server.kill()
    assert await broker.server_faults() == ["the queue's Redis cannot be reached"]


async def test_an_append_only_file_switched_off_matters_where_the_disk_is_waited_for(server: Server) -> None:
    """[G6] With ``durability = disk`` a server without its append-only file is not fit; with memory it is."""
    settings = BrokerSettings(redis_url=server.url, retry_limit_ms=300)
    server.ask("CONFIG", "SET", "appendfsync", "always")
    disk, memory = await Broker.connect(settings, durability="disk"), await Broker.connect(settings)
    assert await disk.server_faults() == []
    server.ask("CONFIG", "SET", "appendonly", "no")
    (fault,) = await disk.server_faults()
    assert "set appendonly yes" in fault
    assert await memory.server_faults() == []
    await disk.close()
    await memory.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose nodes go on without each other. Shard 0 is on the third node, shard 1 on the second."""
    binary = server_binary()
    with partial_cluster(binary, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


async def test_every_node_of_a_cluster_is_vetted(cluster: Cluster) -> None:
    """[G8] At the start and later, a node that would evict jobs is found whichever it is."""
    settings = BrokerSettings(redis_url=cluster.url, shards=2, retry_limit_ms=300)
    broker = await Broker.connect(settings)
    for node in cluster.nodes[1:]:
        node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert await broker.server_faults() == [POLICY]
        with pytest.raises(Exception, match="set maxmemory-policy noeviction"):
            await Broker.connect(settings)
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await broker.server_faults() == []
    await broker.close()
