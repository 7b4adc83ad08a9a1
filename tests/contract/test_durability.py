"""``durability = disk``: work that nobody waits for is taken in once it is on the disk; nothing else waits for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker import Broker, BrokerSettings
from queue_schemas import BrokerFull, BrokerUnsuitable, Job, Lane, NotOnDisk, State
from queue_schemas.keys import ShardKeys
from router import RouterSettings, build_router
from tests.support.queue import Puller, make_job
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually

KEYS = ShardKeys(0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Valkey that writes its file, and never says that it is on the disk until it is told to see to that."""
    binary = server_binary()
    server = Server(binary, tmp_path / "server").start()
    yield server
    server.stop()


@pytest.fixture
async def brokers(server: Server) -> AsyncIterator[list[Broker]]:
    """Two Routers' connections with that durability."""
    settings = BrokerSettings(redis_url=server.url, retry_limit_ms=3_000, command_timeout_ms=1_500)
    brokers = [await Broker.connect(settings, durability="disk") for _ in range(2)]
    server.ask("CONFIG", "SET", "appendfsync", "no")
    yield brokers
    for broker in brokers:
        await broker.close()


@pytest.fixture
def broker(brokers: list[Broker]) -> Broker:
    return brokers[0]


def kept(server: Server, job: Job) -> bool:
    return bool(server.ask("EXISTS", KEYS.job(job.id)))


@pytest.mark.parametrize(
    "fields", [{"lane": Lane.BACKGROUND}, {"lane": Lane.BATCH}, {"persisted": True, "idempotency_key": "order-17"}]
)
async def test_it_is_taken_in_once_it_is_on_the_disk(
    server: Server, brokers: list[Broker], fields: dict[str, object]
) -> None:
    """Redis has the job, and could lose it in a crash: it is not acknowledged. When the disk has it, it is."""
    job = make_job(**fields)
    asked = asyncio.create_task(brokers[0].jobs.enqueue(job))
    await eventually(lambda: kept(server, job), "Redis has the job")
    again = asyncio.create_task(brokers[1].jobs.enqueue(job))
    await asyncio.sleep(0.3)
    assert not asked.done()
    assert not again.done(), "a repeated call writes nothing, and waits for what the first one wrote"
    server.ask("CONFIG", "SET", "appendfsync", "everysec")
    async with asyncio.timeout(10):
        assert (await asked, await again) == (State.QUEUED, State.QUEUED)
    server.restart()
    assert kept(server, job)


async def test_what_somebody_waits_for_does_not_wait_for_the_disk(server: Server, broker: Broker) -> None:
    """Its Router queues it again should Redis lose it; and while others wait for the disk, nothing else does."""
    waiting = [asyncio.create_task(broker.jobs.enqueue(make_job(lane=Lane.BATCH))) for _ in range(200)]
    async with asyncio.timeout(1.2):
        assert await broker.jobs.enqueue(make_job()) is State.QUEUED
        assert await broker.jobs.enqueue(make_job(persisted=True, stream=True)) is State.QUEUED, (
            "a stream that may be resumed"
        )
        worker = await Puller(broker).join()
        assert (await worker.claim_one()).job.lane is Lane.INTERACTIVE
        await broker.workers.renew(worker.session_id)
    assert not any(task.done() for task in waiting)
    before = broker.round_trips
    server.ask("CONFIG", "SET", "appendfsync", "always")
    async with asyncio.timeout(10):
        assert set(await asyncio.gather(*waiting)) == {State.QUEUED}
    assert broker.round_trips - before < 20, "many share a pipeline"


async def test_a_disk_that_does_not_confirm_is_reported(server: Server, broker: Broker) -> None:
    """After the limit the caller hears what is known: Redis has it, the disk may not."""
    job = make_job(lane=Lane.BATCH)
    with pytest.raises(
        NotOnDisk, match="its disk did not confirm it within 3 s: it may be run, and a crash may lose it"
    ):
        async with asyncio.timeout(15):
            await broker.jobs.enqueue(job)
    assert kept(server, job)


async def test_a_restart_meanwhile_confirms_nothing_that_it_lost(server: Server, broker: Broker) -> None:
    """The server that comes back without the job is given it again, before it is acknowledged."""
    size = {path: path.stat().st_size for path in (server.folder / "appendonlydir").iterdir()}
    job = make_job(lane=Lane.BATCH)
    asked = asyncio.create_task(broker.jobs.enqueue(job))
    await eventually(lambda: kept(server, job), "Redis has the job")
    server.kill()
    for path, before in size.items():
        with path.open("r+b") as file:
            file.truncate(before)
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(10):
        assert await asked is State.QUEUED
    assert kept(server, job)


async def test_full_memory_is_reported_at_once(server: Server, broker: Broker) -> None:
    """As without it: new work is refused."""
    server.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(BrokerFull):
        async with asyncio.timeout(1.2):
            await broker.jobs.enqueue(make_job(lane=Lane.BATCH))


async def refusal(server: Server) -> str:
    with pytest.raises(BrokerUnsuitable) as refused:
        await Broker.connect(BrokerSettings(redis_url=server.url), durability="disk")
    return refused.value.message


async def test_a_server_that_cannot_say_is_refused(server: Server) -> None:
    """No append-only file, or one that is never synced: the sentence says what to set."""
    server.ask("CONFIG", "SET", "appendfsync", "no")
    assert "set appendfsync everysec or always there, or durability to memory here" in await refusal(server)
    server.ask("CONFIG", "SET", "appendonly", "no")
    assert "set appendonly yes there, or durability to memory here" in await refusal(server)


async def test_a_router_that_is_to_wait_for_the_disk_does(server: Server) -> None:
    """The setting reaches its queue: a server that cannot say what is on its disk ends the Router with the sentence."""
    server.ask("CONFIG", "SET", "appendfsync", "no")
    app = build_router(RouterSettings(durability="disk"), BrokerSettings(redis_url=server.url))
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(10), app.running():
            await asyncio.Event().wait()
    assert "durability is disk" in str(ended.value.exceptions[0])


async def test_redis_70_has_to_sync_always(tmp_path: Path) -> None:
    """It has no WAITAOF, and needs none if every reply waits for the disk."""
    binary = server_binary("redis")
    server = Server(binary, tmp_path / "redis").start()
    try:
        assert "set appendfsync always there, upgrade it, or set durability to memory here" in await refusal(server)
        server.ask("CONFIG", "SET", "appendfsync", "always")
        broker = await Broker.connect(BrokerSettings(redis_url=server.url), durability="disk")
        assert await broker.jobs.enqueue(make_job(lane=Lane.BATCH)) is State.QUEUED
        await broker.close()
    finally:
        server.stop()
