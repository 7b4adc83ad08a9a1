"""Workers that nobody can reach, on a Redis that lets each role do what it must and no more."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from broker import Broker, BrokerSettings
from broker.redis.scripts import load_scripts
from inferq.doctor import DoctorTarget, Level
from inferq.doctor.queue import check_queue
from inferq.fleet.client import FleetClient
from queue_schemas import FABRIC_PREFIX, BrokerUnsuitable, new_session_id
from telemetry.environment import free_port
from tests.integration.membership.scene import WAIT_LIMIT_S, LongStream, open_ended_engine
from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import ROOT, Fleet, Role
from tests.support.servers import Certificates, Cluster, Server, server_binary
from tests.support.waiting import eventually

PASSWORD = "of-this-test"
SCRIPTS = {
    "worker": (
        *("join", "claim", "renew", "reconcile_leases", "settle", "attach", "release", "clear_suspicion"),
        *("act_as_manager", "reclaim", "expire", "survey", "audit"),
    ),
    "router": (
        *("enqueue", "attach", "detach", "resume", "raise_epoch", "cancel"),
        *("show_persisted", "delete_persisted", "keep_reply_stream", "delete_dead_letters"),
    ),
    "manager": ("act_as_manager", "reclaim", "expire", "survey", "audit"),
}
"""What each role runs of ``broker/lua``; a worker that leaves reclaims itself, and sweeps for a missing Manager."""
ITSELF = {
    "worker": "ping info time hget hgetall hkeys hset hsetnx hdel eval evalsha memory|usage xread xadd xtrim",
    "router": (
        "ping info time get hget hmget hsetnx hgetall hset hdel eval evalsha xread xrange xadd xtrim "
        "zrem zrevrangebylex"
    ),
    "manager": "ping info time hget hmget hsetnx hgetall hkeys hset hdel eval evalsha xadd config|get",
}
"""What each role sends beside scripts."""
PASSED_OVER = {b"config|get", b"client|setinfo"}
"""Refused to a Router or a worker without harm: the one serves a warning, the other is redis-py's greeting."""


def rules(role: str) -> list[str]:
    """The rules of a role's user as docs/topologies.md has them."""
    page = (ROOT / "docs" / "topologies.md").read_text()
    found = re.findall(rf"^ACL SETUSER inferq-{role} (.+)$", page, re.MULTILINE)
    assert len(found) == 1
    return [rule.replace(">PASSWORD", f">{PASSWORD}") for rule in found[0].split()]


@pytest.mark.parametrize("role", ["worker", "router", "manager"])
def test_the_rules_are_what_the_scripts_need(role: str) -> None:
    """The commands in the document are those that the role and its scripts send: none is missing, none is too much."""
    text = "".join(load_scripts(flags=True)[name].source for name in SCRIPTS[role])
    needed = {command.lower() for command in re.findall(r"(?:call|gather)\('([A-Z]+)'", text)} | set(
        ITSELF[role].split()
    )
    assert {rule[1:] for rule in rules(role) if rule.startswith("+")} == needed


def set_users(server: Server) -> None:
    """Give each role its user."""
    for role in SCRIPTS:
        server.ask("ACL", "SETUSER", f"inferq-{role}", *rules(role))


def url_of(role: str, server: Server) -> str:
    """The server as a role's user."""
    return server.url.replace("://", f"://inferq-{role}:{PASSWORD}@")


@pytest.fixture
def tls_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis 7.0 that speaks TLS, with a user per role."""
    binary = server_binary("redis")
    server = Server(binary, tmp_path / "redis", certificates=Certificates.make(tmp_path / "ca")).start()
    set_users(server)
    yield server
    server.stop()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A URL whose port accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_a_worker_that_nobody_reaches_serves(tmp_path: Path, tls_redis: Server, black_hole: str) -> None:
    """Two workers know only a Router's URL and are told of Redis; their own URLs are refused or swallowed. They answer
    and stream, an abort and a drain reach them through Redis, and no role was refused anything there. A worker whose
    user lacks a right ends with a sentence that names it."""
    assert tls_redis.certificates is not None
    env = {"INFERQ_BROKER_TLS_CA_FILE": str(tls_redis.certificates.ca)}
    # With heartbeats so far apart, only the control stream can tell a worker anything.
    slow = {"heartbeat_interval_ms": 30_000, "unresponsive_after_ms": 60_000}
    manager = slow | {
        "redis_url": url_of("manager", tls_redis),
        "advertised_redis_url": url_of("worker", tls_redis),
        "lease_ms": 6_000,
    }
    router = {"redis_url": url_of("router", tls_redis)}
    async with (
        open_ended_engine() as engine,
        Fleet(tmp_path, tls_redis, manager=manager, router=router, env=env) as fleet,
    ):
        closed = f"http://127.0.0.1:{free_port()}"
        roles = [fleet.manager, fleet.router]
        roles.append(fleet.worker("swallowed", manager_url=fleet.router.url, advertise_url=black_hole))
        roles.append(
            fleet.worker(
                "refused", manager_url=fleet.router.url, advertise_url=closed, engine="url", engine_url=engine.url
            )
        )
        for role in roles:
            role.process.start()
        await asyncio.gather(*(role.ready() for role in roles))
        await fleet.until_served(1)
        assert await _echo(fleet, "hello") == "hello"

        leaving = await LongStream(fleet, fleet.router).begun()
        await leaving.leave()
        await eventually(lambda: engine.open == 0, "the abort reaches the worker's engine", limit_s=WAIT_LIMIT_S)
        staying = await LongStream(fleet, fleet.router).begun()
        url = f"{fleet.router.url}{FABRIC_PREFIX}/workers/refused/drain"
        async with fleet.session.post(url) as answer:
            assert answer.status == 202

        async def draining() -> bool:
            return bool((await fleet.workers[1].page("/status"))["draining"])

        await eventually(draining, "the drain reaches the worker", limit_s=10)
        engine.finish()
        await staying.whole()
        assert await fleet.workers[1].ended() == 0

        async def noted() -> bool:
            workers = (await fleet.router.page(f"{FABRIC_PREFIX}/workers"))["workers"]
            return any(worker["worker_id"] == "swallowed" and worker["url_note"] for worker in workers)

        await eventually(noted, "the Manager notes that it cannot reach the worker", limit_s=WAIT_LIMIT_S)
        assert await _echo(fleet, "still here") == "still here"
        assert "session_declared_dead" not in fleet.manager.process.log_text()
        refusals = {entry[b"object"] for entry in map(_entry, tls_redis.ask("ACL", "LOG"))}
        assert refusals <= PASSED_OVER
        assert b"config|get" in refusals, "the log of refusals shows what is refused"

        tls_redis.ask("ACL", "SETUSER", "inferq-poor", *rules("worker"), "-info")
        poor = fleet.worker("poor", manager_url=fleet.router.url, redis_url=url_of("poor", tls_redis))
        poor.process.start()
        assert await poor.ended(WAIT_LIMIT_S) == 2
        sentence = poor.process.log_text().splitlines()[-1]
        assert sentence.startswith("inferq: ")
        assert "'info'" in sentence
        assert PASSWORD not in poor.process.log_text()


async def _echo(fleet: Fleet, text: str) -> str:
    body = {"model": "sim", "messages": [{"role": "user", "content": text}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        page = await answer.json()
        assert answer.status == 200, page
        content: str = page["choices"][0]["message"]["content"]
        return content


def _entry(raw: object) -> dict[bytes, object]:
    if isinstance(raw, dict):
        return raw
    assert isinstance(raw, list)
    return dict(zip(raw[::2], raw[1::2], strict=True))


@pytest.fixture(params=["redis", "valkey"])
def server_with_users(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Either kind of server, with a user per role."""
    binary = server_binary(request.param)
    server = Server(binary, tmp_path / "own").start()
    set_users(server)
    yield server
    server.stop()


FORBIDDEN = (
    ("FLUSHALL",),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("ACL", "LIST"),
    ("HGETALL", "iq:workers"),
    ("HSET", "iq:manager", "until", "0"),
    ("HGET", "somebody-else", "x"),
    ("HSET", "iqx", "x", "1"),
    ("EVAL", "return redis.call('HSET', 'iq:manager', 'holder', 'me')", "1", "iq:{0}:budget"),
    ("EVAL", "return redis.call('KEYS', '*')", "1", "iq:{0}:budget"),
)


def test_a_worker_may_do_nothing_else(server_with_users: Server) -> None:
    """A worker's password empties no database, lists no keys, and moves no Manager, in a script or without."""
    with redis.Redis.from_url(url_of("worker", server_with_users)) as client:
        assert client.ping()
        for command in FORBIDDEN:
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|executing the script can't"):
                client.execute_command(*command)


async def test_a_missing_right_is_named(server_with_users: Server) -> None:
    """Without a command that it sends itself, a role names it; within a script, it says at once where to look. The
    doctor says the same."""
    url = url_of("worker", server_with_users)
    broker = await Broker.connect(BrokerSettings(redis_url=url))
    try:
        session_id = new_session_id("w")
        await broker.workers.join(session_id)
        server_with_users.ask("ACL", "SETUSER", "inferq-worker", "-hincrby")
        with pytest.raises(BrokerUnsuitable, match="ACL LOG"):
            await broker.workers.renew(session_id)
        server_with_users.ask("ACL", "SETUSER", "inferq-worker", "-xread")
        with pytest.raises(BrokerUnsuitable, match="'xread'"):
            await broker.workers.read_control(0, session_id, "0", 10)
    finally:
        await broker.close()
    server_with_users.ask("ACL", "SETUSER", "inferq-worker", "-info")
    with pytest.raises(BrokerUnsuitable, match="'info'"):
        await Broker.connect(BrokerSettings(redis_url=url))
    client = FleetClient("http://127.0.0.1:1")
    (finding,) = await check_queue(DoctorTarget(redis_url=url, client=client, data_dir=Path()))
    assert finding.level is Level.FAILURE
    assert "'info'" in finding.text


async def test_a_worker_may_stand_in_for_the_manager(server_with_users: Server) -> None:
    """With the rules of the document, a worker takes the sweeper's lease, sweeps, and gives it up."""
    broker = await Broker.connect(BrokerSettings(redis_url=url_of("worker", server_with_users)))
    try:
        assert await broker.fleet.leader_lease_until() == 0
        assert await broker.fleet.acquire_sweeper_lease("w", 1_000)
        await broker.maintenance.expire(0)
        assert not await broker.fleet.acquire_sweeper_lease("w", 0)
    finally:
        await broker.close()
    refusals = {entry[b"object"] for entry in map(_entry, server_with_users.ask("ACL", "LOG"))}
    assert refusals <= PASSED_OVER


async def test_a_manager_may_claim_a_pool_for_an_autoscaler(server_with_users: Server) -> None:
    """With the rules of the document; and a Router may read which pools are claimed."""
    manager = await Broker.connect(BrokerSettings(redis_url=url_of("manager", server_with_users)))
    router = await Broker.connect(BrokerSettings(redis_url=url_of("router", server_with_users)))
    try:
        assert await manager.known_pools.claim("org/m", "a", 60_000)
        assert (await router.known_pools.remembered()).scaled == {"org/m"}
        assert not await manager.known_pools.claim("org/m", "a", 0)
        assert (await router.known_pools.remembered()).scaled == frozenset()
    finally:
        await manager.close()
        await router.close()
    refusals = {entry[b"object"] for entry in map(_entry, server_with_users.ask("ACL", "LOG"))}
    assert refusals <= PASSED_OVER


async def test_a_cluster_asks_for_two_more_commands(tmp_path: Path) -> None:
    """On a Redis Cluster the client asks where keys are: with two commands more, each role works."""
    binary = server_binary()
    page = (ROOT / "docs" / "topologies.md").read_text()
    added = re.search(r"On a Redis Cluster each user also needs `([^`]+)`", page)
    assert added is not None
    cluster = Cluster(binary, tmp_path / "cluster")
    try:
        await asyncio.to_thread(cluster.start)
        for node in cluster.nodes:
            for role in SCRIPTS:
                node.ask("ACL", "SETUSER", f"inferq-{role}", *rules(role), *added[1].split())
        brokers = {
            role: await Broker.connect(
                BrokerSettings(
                    redis_url=cluster.url.replace("://", f"://inferq-{role}:{PASSWORD}@"),
                    shards=2,
                    retry_limit_ms=2_000,
                )
            )
            for role in SCRIPTS
        }
        session_id = new_session_id("w")
        await brokers["worker"].workers.join(session_id)
        await brokers["worker"].workers.renew(session_id)
        assert session_id in await brokers["manager"].maintenance.renewal_counters()
        assert await brokers["manager"].fleet.acquire_leader_lease("m", 1_000)
        assert await brokers["router"].stats.depths() == {}
        await brokers["worker"].workers.leave(session_id)
        for broker in brokers.values():
            await broker.close()
    finally:
        await asyncio.to_thread(cluster.stop)


async def test_redis_out_of_reach_of_one_site(tmp_path: Path, own_valkey: Server) -> None:
    """The Manager reaches Redis, a Router and a worker do not yet: both say so, wait, and serve by themselves when they
    can."""
    async with FaultProxy(own_valkey.port) as proxy:
        router = {"redis_url": proxy.url}
        async with Fleet(tmp_path, own_valkey, router=router) as fleet:
            await fleet.manager.start()
            proxy.cut()
            worker = fleet.worker("worker-1", redis_url=proxy.url)
            for role in (fleet.router, worker):
                role.process.start()
            await _says(fleet.router, "/readyz", b"cannot be reached", "queue_unreachable")
            await _says(worker, "/ready", b"Redis is not reached", "queue_unreachable")
            proxy.heal()
            await asyncio.gather(fleet.router.ready(), worker.ready())
            await fleet.until_served(1)
            assert await _echo(fleet, "hello") == "hello"


async def _says(role: Role, path: str, words: bytes, line: str) -> None:
    async def said() -> bool:
        status, body = await role.get(path)
        return status == 503 and words in body and line in role.process.log_text()

    await eventually(said, f"{role.name} says {words!r}", limit_s=WAIT_LIMIT_S)
