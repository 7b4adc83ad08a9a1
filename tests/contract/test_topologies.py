"""The most important promises where the server is a Cluster, behind Sentinel, or wants TLS and an ACL user."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from broker import Broker, BrokerSettings
from queue_schemas import (
    Control,
    ControlKind,
    Frame,
    Lane,
    Marker,
    Outcome,
    Settled,
    State,
    new_session_id,
    shard_of_pool,
)
from tests.support.queue import Puller, answer_frame, make_job
from tests.support.servers import (
    PASSWORD,
    Certificates,
    Cluster,
    Sentinel,
    Server,
    server_binary,
)
from tests.support.waiting import eventually


@dataclass(frozen=True)
class Topology:
    """Where to connect, and to how many shards."""

    name: str
    settings: BrokerSettings
    server: object


@pytest.fixture(scope="module", params=["cluster", "sentinel", "tls+acl"])
def topology(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """One of each, made once."""
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.ExitStack() as exits:
        if request.param == "cluster":
            binary = server_binary()
            cluster = Cluster(binary, folder)
            exits.callback(cluster.stop)
            cluster.start()
            yield Topology("cluster", BrokerSettings(redis_url=cluster.url, shards=2, retry_limit_ms=8_000), cluster)
            return
        binary = server_binary("redis")
        if request.param == "sentinel":
            sentinel = Sentinel(binary, folder)
            exits.callback(sentinel.stop)
            sentinel.start()
            yield Topology("sentinel", BrokerSettings(redis_url=sentinel.url, retry_limit_ms=20_000), sentinel)
            return
        certificates = Certificates.make(folder / "ca")
        server = Server(binary, folder / "tls", user="fabric", password=PASSWORD, certificates=certificates)
        exits.callback(server.stop)
        server.start()
        settings = BrokerSettings(redis_url=server.url, tls_ca_file=str(certificates.ca), retry_limit_ms=3_000)
        yield Topology("tls+acl", settings, server)


@pytest.fixture
async def broker(topology: Topology) -> AsyncIterator[Broker]:
    """A broker connected as a role would be."""
    broker = await Broker.connect(topology.settings)
    yield broker
    await broker.close()


def models(shards: int) -> list[str]:
    """One model per shard."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < shards:
        name = f"model-{number}"
        found.setdefault(shard_of_pool(name, shards), name)
        number += 1
    return [found[shard] for shard in range(shards)]


async def pullers(broker: Broker) -> list[Puller]:
    """One worker as every shard sees it."""
    session_id = new_session_id("w")
    await broker.workers.join(session_id)
    return [Puller(broker, session_id, shard) for shard in range(broker.shards)]


async def test_jobs_go_through_every_shard_and_answers_come_back(broker: Broker) -> None:
    """Enqueue, claim, publish, settle and the way back, on all shards at once; a repeat is a duplicate."""
    news: list[Frame | Marker] = []
    router = new_session_id("router")
    reading = asyncio.create_task(broker.replies.read(router, news.extend))
    async with asyncio.timeout(20):
        await broker.replies.ready.wait()
        workers = await pullers(broker)
        names = models(broker.shards)
        jobs = [
            make_job(model=names[n % broker.shards], shards=broker.shards, reply_to=router, tenant=f"t{n % 3}")
            for n in range(40)
        ]
        assert await asyncio.gather(*map(broker.jobs.enqueue, jobs)) == [State.QUEUED] * 40
        assert sum(lanes[Lane.INTERACTIVE].waiting for lanes in (await broker.stats.depths()).values()) == 40
        for worker, name in zip(workers, names, strict=True):
            for lease in await worker.claim(40, models=(name,)):
                assert await broker.attempts.publish(worker.shard, {router: b"", new_session_id("gone"): b""})
                assert (
                    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, lease.job.id.encode()))
                    is Settled.OK
                )
                assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.DUPLICATE
        await eventually(lambda: len(news) == 40, "every answer comes back")
        assert {frame.data.decode() for frame in news if isinstance(frame, Frame)} == {job.id for job in jobs}
        await broker.workers.leave(workers[0].session_id)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def test_a_parked_worker_is_woken_and_a_dead_one_reclaimed(broker: Broker) -> None:
    """Waking, control messages, renewal, fencing and requeueing on each shard."""
    workers = await pullers(broker)
    for worker, name in zip(workers, models(broker.shards), strict=True):
        await worker.control_messages()
        assert await worker.claim(models=(name,)) == []
        await broker.jobs.enqueue(make_job(model=name, shards=broker.shards, max_attempts=2))
        assert Control(ControlKind.WAKE) in await worker.control_messages(block_ms=2_000)
        late = await worker.claim_one(models=(name,))
        await broker.workers.renew(worker.session_id)
        assert worker.session_id in await broker.maintenance.renewal_counters()
        heir = Puller(broker, shard=worker.shard)
        await heir.join()
        assert (await broker.maintenance.reclaim(worker.session_id)).requeued == 1
        assert await broker.attempts.settle(late, Outcome.DONE) is Settled.FENCED
        lease = await heir.claim_one(models=(name,))
        assert (lease.job, lease.attempt) == (late.job, 2)
        assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK
        await broker.workers.leave(heir.session_id)
        for other in workers:
            await broker.workers.join(other.session_id)
    await broker.workers.leave(workers[0].session_id)


async def test_cancel_expire_and_the_managers_lease(broker: Broker) -> None:
    """The remaining operations, on each shard."""
    for name in models(broker.shards):
        cancelled = make_job(model=name, shards=broker.shards)
        late = make_job(model=name, shards=broker.shards, ttl_ms=1)
        await broker.jobs.enqueue(cancelled)
        await broker.jobs.enqueue(late)
        assert await broker.jobs.cancel(cancelled.id, "gone") is State.QUEUED
        await asyncio.sleep(0.005)
        assert (await broker.maintenance.expire()).expired == 1
        assert await broker.jobs.enqueue(late) is State.EXPIRED
    assert await broker.fleet.acquire_leader_lease("m", 50)
    await broker.known_pools.remember(["a"], declared=True)
    assert ((await broker.known_pools.remembered()).known)["a"] is True  # type: ignore[index]
    await broker.fleet.release_leader_lease("m")
    assert (await broker.facts()).maxmemory_policy in ("noeviction", "")


@pytest.mark.parametrize("topology", ["cluster"], indirect=True)
async def test_work_is_on_the_disk_of_every_shard(topology: Topology) -> None:
    """With ``durability = disk`` each job is confirmed by the node that has its shard."""
    broker = await Broker.connect(topology.settings, durability="disk")
    jobs = [make_job(model=name, shards=broker.shards, lane=Lane.BATCH) for name in models(broker.shards) for _ in "ab"]
    async with asyncio.timeout(15):
        assert await asyncio.gather(*map(broker.jobs.enqueue, jobs)) == [State.QUEUED] * len(jobs)
    for job in jobs:
        await broker.jobs.cancel(job.id, "done with")
    await broker.close()


@pytest.mark.parametrize("topology", ["sentinel"], indirect=True)
async def test_the_queue_follows_a_failover(broker: Broker, topology: Topology) -> None:
    """Sentinel names a new primary: calls made meanwhile wait and succeed, and what was replicated is there."""
    sentinel = topology.server
    assert isinstance(sentinel, Sentinel)
    job = make_job(model="failover")
    await broker.jobs.enqueue(job)
    await eventually(lambda: sentinel.replica.ask("EXISTS", f"iq:{{0}}:job:{job.id}"), "the replica has the job")
    sentinel.primary.kill()
    worker = await Puller(broker).join()
    lease = await worker.claim_one(models=("failover",))
    assert lease.job == job
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_leases_are_renewed_from_another_threads_loop(broker: Broker) -> None:
    """A renewer apart has a connection of its own there, raises the number on every shard, and leaves nothing open."""
    worker = await Puller(broker).join()
    before = (await broker.maintenance.renewal_counters())[worker.session_id]
    renewer = broker.workers.renewer_apart()

    async def renew() -> None:
        try:
            await renewer.renew(worker.session_id)
        finally:
            await renewer.close()

    await asyncio.to_thread(asyncio.run, renew())
    assert (await broker.maintenance.renewal_counters())[worker.session_id] == before + broker.shards
    await broker.workers.leave(worker.session_id)
