"""The way back: frames and markers reach the Router that waits, in order, through outages, and memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker import Broker, BrokerSettings, Undelivered
from broker.operations.replies import extend_reply_stream
from queue_schemas import (
    END,
    HEAD,
    Frame,
    JobId,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    SessionId,
    Settled,
    new_job_id,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.queue import Puller, ServerBackend, answer_frame, make_job
from tests.support.waiting import eventually

from .conftest import Connect


class Reader:
    """A Router's reading task, its news gathered."""

    def __init__(self, broker: Broker) -> None:
        self.router: SessionId = new_session_id("router")
        self.broker = broker
        self.news: list[Frame | Marker] = []
        self.lost: list[int] = []

    async def run(self) -> None:
        await self.broker.replies.read(self.router, self.news.extend, self.lost.append)

    @property
    def frames(self) -> list[Frame]:
        return [news for news in self.news if isinstance(news, Frame)]


@contextlib.asynccontextmanager
async def reading(broker: Broker) -> AsyncIterator[Reader]:
    """Read until the block ends."""
    reader = Reader(broker)
    task = asyncio.create_task(reader.run())
    try:
        async with asyncio.timeout(10):
            await broker.replies.ready.wait()
        yield reader
    finally:
        while not task.done():  # over fakeredis a cancellation may be lost
            task.cancel()
            await asyncio.wait([task], timeout=1)
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """fakeredis wakes only one of several blocked readers; and a stopped test need not wait for a block's end."""
    monkeypatch.setattr("broker.operations.replies._BLOCK_MS", 50)
    monkeypatch.setattr("broker.operations.replies._EXTEND_EVERY_S", 0.5)


@pytest.fixture
async def reader(connect: Connect) -> AsyncIterator[Reader]:
    """A Router that reads over a connection of its own."""
    async with reading(await connect()) as reader:
        yield reader


def frame(lease: Lease, seq: int, data: bytes, flags: int = 0) -> bytes:
    """One packed frame."""
    status, content_type = (200, "text/event-stream") if flags & HEAD else (0, "")
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, flags, data, status, content_type).pack()


async def test_an_answer_reaches_the_router_that_waits(broker: Broker, worker: Puller, reader: Reader) -> None:
    """The frame of a settle arrives with its bytes, status and type."""
    await broker.jobs.enqueue(make_job(reply_to=reader.router))
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, b'{"choices":[]}'))
    await eventually(lambda: reader.news, "the answer arrives")
    (got,) = reader.frames
    assert (got.job_id, got.data, got.status, got.flags) == (lease.job.id, b'{"choices":[]}', 200, HEAD | END)


async def test_a_stream_arrives_in_order(broker: Broker, worker: Puller, reader: Reader) -> None:
    """Published frames and the settle's last one come in the order of ``seq``."""
    await broker.jobs.enqueue(make_job(reply_to=reader.router, stream=True))
    lease = await worker.claim_one()
    assert await broker.attempts.publish(0, {reader.router: frame(lease, 0, b"a", HEAD)}) == {}
    for seq in range(1, 40, 2):
        two = frame(lease, seq, b"b") + frame(lease, seq + 1, b"c")
        assert await broker.attempts.publish(0, {reader.router: two}) == {}
    await broker.attempts.settle(lease, Outcome.DONE, frame(lease, 41, b"z", END))
    await eventually(lambda: reader.frames and reader.frames[-1].flags & END, "the last frame arrives")
    assert [got.seq for got in reader.frames] == list(range(42))


async def test_publishing_names_the_routers_that_are_gone(broker: Broker, worker: Puller, reader: Reader) -> None:
    """Frames for a dead Router create nothing, and the worker learns that nobody listens."""
    gone = new_session_id("gone")
    await broker.jobs.enqueue(make_job(reply_to=reader.router))
    lease = await worker.claim_one()
    packed = frame(lease, 0, b"x", HEAD)
    assert await broker.attempts.publish(0, {gone: packed, reader.router: packed}) == {gone: Undelivered.GONE}
    await eventually(lambda: reader.frames, "the living Router gets its frame")
    assert await broker.attempts.publish(0, {}) == {}


async def test_a_malformed_entry_is_passed_over(broker: Broker, worker: Puller, reader: Reader, client: Any) -> None:
    """Bytes that are no frames, or no marker, cost their sender the message, and nobody else anything."""
    key = ShardKeys(0).reply(reader.router)
    for fields in ({"f": b"\xc1\xff"}, {"m": b"what is this"}, {"unknown": b"field"}, {"f": b"\x93\x01\x02\x03"}):
        await client.xadd(key, fields, nomkstream=True)
    await broker.jobs.enqueue(make_job(reply_to=reader.router))
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    await eventually(lambda: reader.news, "the good entry arrives")
    assert [got.job_id for got in reader.frames] == [lease.job.id]


async def test_what_was_read_is_trimmed(broker: Broker, worker: Puller, reader: Reader, client: Any) -> None:
    """A long stream does not pile up in Redis while it is being read."""
    await broker.jobs.enqueue(make_job(reply_to=reader.router))
    lease = await worker.claim_one()
    for seq in range(700):
        await broker.attempts.publish(0, {reader.router: frame(lease, seq, b"x" * 100, HEAD if seq == 0 else 0)})
    await eventually(lambda: len(reader.frames) == 700, "everything arrives")

    async def short() -> bool:
        return bool(await client.xlen(ShardKeys(0).reply(reader.router)) <= 520)

    await eventually(short, "what was read is dropped")


async def test_a_backlog_is_cut_into_entries(broker: Broker, worker: Puller, reader: Reader, client: Any) -> None:
    """What gathered while Redis was away, or the Router did not read, is no entry that takes its Router minutes."""
    await broker.jobs.enqueue(make_job(reply_to=reader.router))
    lease = await worker.claim_one()
    sizes = [600_000, 600_000, 10, 1_500_000, *[1_000] * 1_000]
    backlog = b"".join(frame(lease, seq, b"x" * size, 0 if seq else HEAD) for seq, size in enumerate(sizes))
    assert await broker.attempts.publish(0, {reader.router: backlog}) == {}
    await eventually(lambda: len(reader.frames) == len(sizes), "everything arrives")
    assert [(got.seq, len(got.data)) for got in reader.frames] == list(enumerate(sizes))
    entries = await client.xrange(ShardKeys(0).reply(reader.router))
    lengths = [len(fields[b"f"]) for _, fields in entries if b"f" in fields]
    assert all(length <= 1 << 20 or 1_500_000 < length < 1_501_000 for length in lengths)


async def test_the_stream_of_a_router_that_does_not_read_is_bounded(real_backend: ServerBackend) -> None:
    """It takes no more than it may hold and a sixteenth. Once its Router has read and trimmed it, it takes more; an
    attempt can be settled meanwhile."""
    limit = 8 << 20
    settings = BrokerSettings(redis_url=real_backend.server.url, max_reply_bytes=limit)
    broker = await Broker.connect(settings)
    client = real_backend.client()
    keys, router = ShardKeys(0), new_session_id("router")
    try:
        await extend_reply_stream(broker._caller, keys, router, 60_000)
        await broker.jobs.enqueue(make_job(reply_to=router))
        lease = await (await Puller(broker).join()).claim_one()
        sent, answer = 0, {}
        while not answer:
            assert sent < 2 * limit, "it was never full"
            answer = await broker.attempts.publish(0, {router: frame(lease, 0, b"x" * 65_000)})
            sent += 65_000
        assert answer == {router: Undelivered.FULL}
        assert await broker.attempts.publish(0, {router: b"x"}) == {router: Undelivered.FULL}
        assert 0.9 * limit < await client.memory_usage(keys.reply(router), samples=0) < 1.15 * limit
        assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
        last = (await client.xrevrange(keys.reply(router), count=1))[0][0].decode()
        await extend_reply_stream(broker._caller, keys, router, 60_000, last)
        assert await broker.attempts.publish(0, {router: b"x"}) == {}
    finally:
        await broker.close()
        await client.aclose()


async def test_the_stream_of_a_dead_router_expires(broker: Broker, reader: Reader, client: Any) -> None:
    """The stream lives 60 s of the queue's time unless its Router keeps it alive; then the sweep removes it."""
    keys = ShardKeys(0)
    now_ms = int((await client.get(keys.clock)).split()[1])
    assert 30_000 < await client.zscore(keys.readers, reader.router) - now_ms <= 60_000
    await broker.maintenance.expire()
    assert await client.exists(keys.reply(reader.router))
    await client.zadd(keys.readers, {reader.router: now_ms})
    await broker.maintenance.expire()
    assert not await client.exists(keys.reply(reader.router))
    assert await client.zcard(keys.readers) == 0


async def test_a_stream_that_vanished_is_made_again_and_reported(
    broker: Broker, worker: Puller, connect: Connect, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a data loss the Router's stream comes back, and the Router is told that answers may be missing."""
    monkeypatch.setattr("broker.operations.replies._EXTEND_EVERY_S", 0.02)
    async with reading(await connect()) as reader:
        await client.delete(ShardKeys(0).reply(reader.router))
        await eventually(lambda: reader.lost, "the loss is told")
        await broker.jobs.enqueue(make_job(reply_to=reader.router))
        lease = await worker.claim_one()
        await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
        await eventually(lambda: reader.frames, "answers arrive again")
        assert reader.lost == [0]


async def test_two_routers_hear_only_their_own(broker: Broker, worker: Puller, connect: Connect) -> None:
    """Each Router's stream is its own."""
    async with reading(await connect()) as first, reading(await connect()) as second:
        readers = (first, second)
        owners: dict[JobId, Reader] = {}
        for turn in range(10):
            job = make_job(reply_to=readers[turn % 2].router)
            owners[job.id] = readers[turn % 2]
            await broker.jobs.enqueue(job)
        for lease in await worker.claim(10):
            await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, lease.job.id.encode()))
        await eventually(lambda: len(first.news) + len(second.news) == 10, "all answers arrive")
        for reader in readers:
            assert {got.job_id for got in reader.frames} == {job for job, owner in owners.items() if owner is reader}
            assert all(got.data.decode() == got.job_id for got in reader.frames)


async def test_a_batch_of_settles_reaches_every_router(broker: Broker, worker: Puller, connect: Connect) -> None:
    """Many settles in one round trip: one entry per Router, all frames in it."""
    async with reading(await connect()) as first, reading(await connect()) as second:
        for turn in range(60):
            await broker.jobs.enqueue(make_job(reply_to=(first, second)[turn % 2].router))
        leases = await worker.claim(60)
        before = broker.round_trips
        await asyncio.gather(*(broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) for lease in leases))
        assert broker.round_trips - before <= 5
        await eventually(lambda: len(first.frames) == len(second.frames) == 30, "all answers arrive")


async def test_a_stream_made_again_under_a_clock_set_back_is_still_read(connect: Connect, client: Any) -> None:
    """Entries go on behind the last one read, whatever the server's clock says."""
    broker = await connect()
    router = new_session_id("router")
    heard: list[Frame | Marker] = []
    key = ShardKeys(0).reply(router)
    reading = asyncio.create_task(broker.replies.read(router, heard.extend))
    async with asyncio.timeout(20):
        await broker.replies.ready.wait()
        hour_ahead = int(time.time() * 1000) + 3_600_000
        marker = Marker(MarkerKind.DEAD, new_job_id(0), 2, "one")
        await client.xadd(key, {"m": marker.pack()}, id=f"{hour_ahead}-0")
        await eventually(lambda: marker in heard, "the first marker is read")
        await client.delete(key)
        second = Marker(MarkerKind.DEAD, new_job_id(0), 2, "two")

        async def made_again() -> bool:
            return bool(await client.exists(key))

        await eventually(made_again, "the stream is made again", limit_s=15)
        await client.execute_command("XADD", key, "NOMKSTREAM", "*", "m", second.pack())
        await eventually(lambda: second in heard, "the second marker is read", limit_s=10)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_router_that_reaches_every_shard_warns_of_none(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """[H47] What is logged of reply streams that are missing is so: all were made, and then nothing is said."""
    monkeypatch.setattr("broker.operations.replies.START_TIMEOUT_S", 0.1)
    with capture_logs() as lines:
        reading = asyncio.create_task(broker.replies.read(new_session_id("router"), lambda _news: None))
        await asyncio.wait_for(broker.replies.ready.wait(), 10)
        await asyncio.sleep(0.3)  # well past the patience
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert lines == []
