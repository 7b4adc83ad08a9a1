"""DurableReplies: answers stay until they are dropped, whoever reads them, and expire when nobody does."""

from __future__ import annotations

from typing import Any

import pytest

from broker import Broker
from queue_schemas import Frame, JobId, Marker, MarkerKind, Outcome, SessionId, new_session_id
from queue_schemas.keys import ShardKeys
from tests.contract.conftest import Connect
from tests.support.queue import MODEL, Puller, answer_frame, make_job

HOUR_MS = 3_600_000


@pytest.fixture
def name() -> SessionId:
    return new_session_id("batch_x")


async def answered(broker: Broker, worker: Puller, name: SessionId, data: bytes) -> JobId:
    """A job whose answer went to the reply stream."""
    await broker.jobs.enqueue(make_job(reply_to=name))
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, data))
    return lease.job.id


async def read(broker: Broker, name: SessionId, after: str = "0") -> list[tuple[str, bytes]]:
    """Entry ids and the data of their one frame."""
    found = []
    for message in await broker.durable_replies.read(0, name, after, 1):
        for item in message.content:
            assert isinstance(item, Frame)
            found.append((message.entry_id, item.data))
    return found


async def test_answers_stay_until_they_are_dropped(
    broker: Broker, worker: Puller, name: SessionId, connect: Connect
) -> None:
    """Another process reads the same ones again; what is dropped, by the id of an entry, is gone, and no more."""
    assert await broker.durable_replies.open(0, name, HOUR_MS)
    for number in range(5):
        await answered(broker, worker, name, b"%d" % number)
    first = await read(broker, name)
    other = await connect()
    assert not await other.durable_replies.open(0, name, HOUR_MS)
    assert await read(other, name) == first
    assert [data for _, data in first] == [b"0", b"1", b"2", b"3", b"4"]
    await broker.durable_replies.trim(0, name, first[2][0])
    await broker.durable_replies.trim(0, name, first[2][0])
    assert await read(other, name) == first[3:]
    assert await read(broker, name, first[3][0]) == first[4:]


async def test_a_durable_stream_lives_as_long_as_it_is_extended(broker: Broker, name: SessionId, client: Any) -> None:
    """Opening it again extends its time, also when it is empty; closing ends it."""
    key = ShardKeys(0).reply(name)
    await broker.durable_replies.open(0, name, 20_000)
    now_ms = int((await client.get(ShardKeys(0).clock)).split()[1])
    assert 10_000 < await client.zscore(ShardKeys(0).readers, name) - now_ms <= 20_000
    (message,) = await broker.durable_replies.read(0, name, "0", 1)
    assert message.content == ()
    await broker.durable_replies.trim(0, name, message.entry_id)
    assert not await broker.durable_replies.open(0, name, HOUR_MS)
    assert await client.zscore(ShardKeys(0).readers, name) - now_ms > 30_000
    await broker.durable_replies.close(0, name)
    assert not await client.exists(key)
    assert await broker.durable_replies.open(0, name, HOUR_MS)


async def test_without_its_durable_stream_no_job_runs(broker: Broker, worker: Puller, name: SessionId) -> None:
    """Jobs that name one that is gone are cancelled, not run for nobody; and told to a reply stream that is there."""
    await broker.jobs.enqueue(make_job(reply_to=name))
    assert await worker.claim(5) == []
    await broker.durable_replies.open(0, name, HOUR_MS)
    job = make_job(reply_to=name)
    await broker.jobs.enqueue(job)
    await broker.jobs.cancel(job.id, "as ordered")
    news = [item for message in await broker.durable_replies.read(0, name, "0", 1) for item in message.content]
    assert [(item.kind, item.job_id) for item in news if isinstance(item, Marker)] == [(MarkerKind.CANCELLED, job.id)]


async def test_reading_waits_for_the_first_entry_and_no_longer(
    broker: Broker, worker: Puller, name: SessionId, connect: Connect
) -> None:
    """Nothing comes: nothing after the time given. Reply streams of one shard share a connection, one after the
    other."""
    others = [new_session_id("batch_y") for _ in range(3)]
    for one in (name, *others):
        await broker.durable_replies.open(0, one, HOUR_MS)
    last = (await broker.durable_replies.read(0, name, "0", 1))[-1].entry_id
    assert await broker.durable_replies.read(0, name, last, 30) == []
    await answered(await connect(), worker, name, b"x")
    assert [data for _, data in await read(broker, name, last)] == [b"x"]
    assert [len(await broker.durable_replies.read(0, one, "0", 1)) for one in others] == [1, 1, 1]


async def test_the_run_id_of_the_server_is_reported(broker: Broker) -> None:
    """The same as long as it is the same; where it cannot be told, empty."""
    assert broker.shard_of(MODEL) == 0
    assert await broker.durable_replies.server_run_id(0) == await broker.durable_replies.server_run_id(0)
