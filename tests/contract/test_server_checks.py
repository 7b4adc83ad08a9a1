"""At the start: a server that cannot carry the queue is refused with a sentence that says how to fix it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import Broker, BrokerSettings
from queue_schemas import BrokerUnavailable, BrokerUnsuitable, Frame, Marker, State, new_session_id
from telemetry.environment import free_port
from tests.support.fault_proxy import FaultProxy, ScriptedRedis
from tests.support.queue import make_job
from tests.support.servers import PASSWORD, Certificates, Server, server_binary
from tests.support.waiting import eventually


async def refusal(url: str, **settings: object) -> str:
    """The sentence with which connecting to ``url`` is refused."""
    with pytest.raises(BrokerUnsuitable) as refused:
        await Broker.connect(BrokerSettings(redis_url=url, retry_limit_ms=300, **settings))  # type: ignore[arg-type]
    return refused.value.message


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ("redis_version:6.2.14\r\nrole:master\r\n", "redis 6.2.14 is too old for the queue; use redis 7.0 or newer"),
        ("redis_version:7.2.4\r\nvalkey_version:7.2.5\r\n", "valkey 7.2.5 is too old"),
        ("redis_version:7.4.0\r\nrole:slave\r\n", "read-only replica; point INFERQ_REDIS_URL at the primary"),
        ("redis_version:7.4.0\r\nrole:master\r\nmaxmemory_policy:allkeys-lru\r\n", "set maxmemory-policy noeviction"),
    ],
)
async def test_an_unsuitable_server_is_refused(info: str, sentence: str) -> None:
    """Too old, a replica, or one that evicts: what is wrong and what to do."""
    async with ScriptedRedis(info) as server:
        assert sentence in await refusal(server.url)


@pytest.mark.parametrize("version", ["redis_version:7.0.0", "redis_version:7.2.4\r\nvalkey_version:8.0.1"])
async def test_the_oldest_supported_servers_are_taken(version: str) -> None:
    """Redis 7.0 and Valkey 8 will do."""
    async with ScriptedRedis(f"{version}\r\nrole:master\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\n") as server:
        broker = await Broker.connect(BrokerSettings(redis_url=server.url))
        assert (await broker.facts()).role == "master"
        await broker.close()


@pytest.fixture(params=["valkey", "redis7"])
def binary(request: pytest.FixtureRequest) -> str:
    """The server programs at hand."""
    return server_binary(request.param)


@pytest.fixture
def locked(binary: str, tmp_path: Path) -> Iterator[Server]:
    """A server that wants a password."""
    server = Server(binary, tmp_path / "locked", password=PASSWORD).start()
    yield server
    server.stop()


async def test_a_wrong_or_missing_password_is_reported(locked: Server) -> None:
    """Not a time-out, not a traceback: check the user and password."""
    assert "check the user and password" in await refusal(f"redis://127.0.0.1:{locked.port}/0")
    assert "check the user and password" in await refusal(f"redis://:wrong@127.0.0.1:{locked.port}/0")
    broker = await Broker.connect(BrokerSettings(redis_url=locked.url))
    await broker.close()


async def test_no_password_appears_in_an_error(locked: Server) -> None:
    """A wrong password is not repeated to whoever reads the logs."""
    assert "hunter2" not in await refusal(f"redis://:hunter2@127.0.0.1:{locked.port}/0")
    assert "hunter2" not in await refusal("http://user:hunter2@127.0.0.1/0")


async def test_a_real_replica_is_refused(binary: str, tmp_path: Path) -> None:
    """A read-only replica says so itself."""
    primary = Server(binary, tmp_path / "primary").start()
    replica = Server(binary, tmp_path / "replica", ("--replicaof", "127.0.0.1", str(primary.port))).start()
    try:
        assert "read-only replica" in await refusal(replica.url)
    finally:
        replica.stop()
        primary.stop()


async def test_a_primary_that_becomes_a_replica_is_left_for_where_its_name_leads(binary: str, tmp_path: Path) -> None:
    """[H45] A failover that gives the name to another server and leaves old connections open: the next calls go to the
    new primary, and a Router's replies are read there, also if the old one never hears of them."""
    old, new = (Server(binary, tmp_path / name).start() for name in ("old", "new"))
    heard: list[Frame | Marker] = []
    lost: list[int] = []
    try:
        async with FaultProxy(old.port) as proxy:
            broker = await Broker.connect(BrokerSettings(redis_url=proxy.url, retry_limit_ms=5_000))
            router = new_session_id("router")
            reading = asyncio.create_task(broker.replies.read(router, heard.extend, lost.append))
            await asyncio.wait_for(broker.replies.ready.wait(), 10)
            await broker.jobs.enqueue(make_job())
            proxy.lead_to(new.port)
            old.ask("REPLICAOF", "127.0.0.1", str(free_port()))
            job = make_job(reply_to=router)
            assert await broker.jobs.enqueue(job) is State.QUEUED
            await eventually(lambda: lost, "the reply stream is made on the new primary")
            await broker.jobs.cancel(job.id, "over")
            await eventually(lambda: heard, "the Router hears from the new primary")
            reading.cancel()
            await broker.close()
    finally:
        old.stop()
        new.stop()


async def test_a_real_server_that_evicts_is_refused(binary: str, tmp_path: Path) -> None:
    """A cache configuration would drop waiting jobs."""
    server = Server(binary, tmp_path / "cache", ("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")).start()
    try:
        assert "set maxmemory-policy noeviction" in await refusal(server.url)
    finally:
        server.stop()


@pytest.mark.parametrize("url", ["redis://{}/0", "redis+cluster://{}", "redis+sentinel://{}/queue"])
async def test_no_server_is_unavailable_at_once(url: str) -> None:
    """Nobody listens: the caller hears so in no time, and may try again."""
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="cannot be reached"):
        await Broker.connect(BrokerSettings(redis_url=url.format(f"127.0.0.1:{free_port()}")))
    assert time.monotonic() - begin < 2


async def test_an_unknown_name_is_unavailable() -> None:
    """A host name that does not resolve may be there tomorrow."""
    with pytest.raises(BrokerUnavailable):
        await Broker.connect(BrokerSettings(redis_url="redis://no-such-host.invalid:6379/0"))


async def test_another_number_of_shards_is_refused(valkey: Server) -> None:
    """The data was made for a number of shards; a process set to another one must not touch it."""
    first = await Broker.connect(BrokerSettings(redis_url=valkey.url, shards=2))
    await first.close()
    assert "set shards to 2" in await refusal(valkey.url, shards=3)


async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    """TLS is checked: without the authority's certificate there is no connection."""
    binary = server_binary("redis")
    server = Server(binary, tmp_path / "tls", certificates=Certificates.make(tmp_path / "ca")).start()
    try:
        with pytest.raises((BrokerUnavailable, BrokerUnsuitable)):
            await Broker.connect(BrokerSettings(redis_url=server.url, retry_limit_ms=300))
    finally:
        server.stop()


async def test_facts_say_what_is_unwise(binary: str, tmp_path: Path) -> None:
    """A server without an append-only file may be used, with a warning in words."""
    server = Server(binary, tmp_path / "volatile", appendonly=False).start()
    broker = await Broker.connect(BrokerSettings(redis_url=server.url))
    try:
        facts = await broker.facts()
        assert any("append-only file is off" in concern for concern in facts.concerns)
        assert await broker.ping() < 1_000
    finally:
        await broker.close()
        server.stop()
