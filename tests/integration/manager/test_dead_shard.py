"""One primary of a real cluster dies: what lies on the others goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from broker import Broker, BrokerSettings
from manager import ManagerService
from manager.service import open_broker
from queue_schemas import (
    Frame,
    InferqError,
    Lane,
    Marker,
    Outcome,
    Settled,
    State,
    new_session_id,
    shard_of_job,
    shard_of_pool,
)
from tests.support.queue import Puller, answer_frame, make_job
from tests.support.servers import Cluster, partial_cluster, server_binary
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, fast_settings

SHARDS = 4
DEAD = 3
"""Of four shards the only one on the first node, which holds nothing that all shards need."""
LEASE_MS = 1_500


def model_of(shard: int) -> str:
    """A model whose jobs live on that shard."""
    return next(name for name in map("m-{}".format, range(99)) if shard_of_pool(name, SHARDS) == shard)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three primaries that go on without each other."""
    binary = server_binary()
    with partial_cluster(binary, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@asynccontextmanager
async def connected(settings: BrokerSettings) -> AsyncIterator[Broker]:
    broker = await Broker.connect(settings)
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def acting(settings: BrokerSettings) -> AsyncIterator[ManagerService]:
    """A Manager that acts."""
    service = ManagerService(
        fast_settings(lease_ms=LEASE_MS), open_broker(settings), FakeProbe(), broker_url=settings.redis_url
    )
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        await eventually(lambda: service.acting, "it acts")
        yield service
    finally:
        stop.set()
        await running


async def test_the_other_shards_of_a_dead_primary_are_served(cluster: Cluster) -> None:
    """[G8] With one primary of three dead, the dead worker's jobs on the other shards are taken back, late ones expire,
    new workers join, renewals count, answers arrive, and the health pages stay as they were; the dead shard's jobs are
    taken back once it answers again."""
    settings = BrokerSettings(redis_url=cluster.url, shards=SHARDS, retry_limit_ms=1_000)
    news: list[Frame | Marker] = []
    async with connected(settings) as broker, acting(settings) as manager:
        router = new_session_id("router")
        reading = asyncio.create_task(broker.replies.read(router, news.extend))
        await asyncio.wait_for(broker.replies.ready.wait(), 10)
        lost = new_session_id("w")
        assert await broker.workers.join(lost) == set()
        held = {}
        for shard in (1, DEAD):
            job = make_job(model=model_of(shard), shards=SHARDS, reply_to=router, max_attempts=3)
            assert await broker.jobs.enqueue(job) is State.QUEUED
            held[shard] = await Puller(broker, lost, shard).claim_one(models=(job.model,))
        cluster.nodes[0].kill()

        live = new_session_id("live")
        assert await broker.workers.join(live) == {DEAD}
        renewer = broker.workers.renewer_apart()

        async def renew() -> None:
            while True:
                await renewer.renew(live)
                await asyncio.sleep(LEASE_MS / 5_000)

        renewing = asyncio.create_task(renew())
        late = make_job(model=model_of(2), shards=SHARDS, reply_to=router, ttl_ms=300)
        assert await broker.jobs.enqueue(late) is State.QUEUED
        await eventually(
            lambda: any(isinstance(item, Marker) and item.job_id == late.id for item in news), "it expires"
        )
        heir = Puller(broker, live, 1)

        async def waits_again() -> bool:
            depths = await broker.stats.depths(set())
            return depths[held[1].job.model][Lane.INTERACTIVE].waiting == 1

        await eventually(waits_again, "what the dead worker held waits again")
        lease = await heir.claim_one(models=(held[1].job.model,))
        assert lease.attempt == 2
        assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
        await eventually(lambda: any(isinstance(item, Frame) for item in news), "the answer arrives")
        assert not renewing.done()
        assert await broker.server_faults() == []
        assert manager.not_ready() == []
        away: set[int] = set()
        assert model_of(DEAD) not in await broker.stats.depths(away)
        assert away == {DEAD}
        pools = [pool.model for pool in (await manager.pools()).pools]
        assert model_of(DEAD) not in pools
        with pytest.raises(InferqError, match="does not answer now"):
            await manager.pool(model_of(DEAD))

        async with connected(settings) as another:  # a Router that starts now
            second = asyncio.create_task(another.replies.read(new_session_id("router"), news.extend))
            await asyncio.wait_for(another.replies.ready.wait(), 20)
            with pytest.raises(InferqError, match="not been reached yet"):
                await another.jobs.enqueue(make_job(model=model_of(DEAD), shards=SHARDS))
            second.cancel()
            with suppress(asyncio.CancelledError):
                await second

        await asyncio.to_thread(cluster.nodes[0].start)

        async def back() -> bool:
            depths = await broker.stats.depths(set())
            return depths.get(held[DEAD].job.model, {}).get(Lane.INTERACTIVE) is not None and (
                depths[held[DEAD].job.model][Lane.INTERACTIVE].waiting == 1
            )

        await eventually(back, "its shard is back, and so is its job", limit_s=40)
        assert shard_of_job(held[DEAD].job.id) == DEAD
        assert not renewing.done()
        for task in (renewing, reading):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await renewer.close()
