"""The frame batcher: frames of all streams, sent together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import uvloop

from broker import Undelivered
from queue_schemas import BrokerUnavailable, Lease, Settled
from tests.support.queue import make_job
from tests.support.waiting import eventually
from worker.frame_batcher import FrameBatcher, FrameSender


class Wire:
    """Where the frame batcher publishes to: records messages; may be held, fail, or know of Routers that are gone."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, dict[str, bytes]]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.failures = 0
        self.gone: set[str] = set()
        self.full: set[str] = set()
        self.delay_s = 0.0
        self.appended: list[tuple[str, bytes]] = []
        self.answer = Settled.OK

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> dict[str, Undelivered]:
        await self.open.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        self.messages.append((shard, dict(frames)))
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("gone for a moment")
        undelivered = dict.fromkeys(self.full, Undelivered.FULL) | dict.fromkeys(self.gone, Undelivered.GONE)
        return {router: why for router, why in undelivered.items() if router in frames}

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        await self.open.wait()
        self.appended.append((lease.job.id, frames))
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("gone for a moment")
        return self.answer

    async def until(self, count: int) -> None:
        await eventually(lambda: len(self.messages) >= count, f"{count} messages", every_s=0.001)


@pytest.fixture
async def wire() -> Wire:
    return Wire()


@pytest.fixture
async def frame_batcher(wire: Wire) -> AsyncIterator[FrameBatcher]:
    box = FrameBatcher(wire.publish, wire.append, interval_ms=5, limit_bytes=1_000)
    task = asyncio.create_task(box.run())
    yield box
    task.cancel()


def channel(frame_batcher: FrameBatcher, to: str = "router", shard: int = 0) -> FrameSender:
    return frame_batcher.open(shard, to, lambda: None)


async def test_frames_of_many_streams_share_a_message(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """One message per Router and shard, whatever the number of streams."""
    wire.open.clear()
    first = channel(frame_batcher)
    first.put(b"0", urgent=True)
    await first.sent()
    for name, to, shard in (("a", "router", 0), ("b", "router", 0), ("c", "other", 0), ("d", "router", 1)):
        channel(frame_batcher, to, shard).put(name.encode())
    wire.open.set()
    await wire.until(3)
    assert wire.messages[0] == (0, {"router": b"0"})
    assert dict(wire.messages[1:]) == {0: {"router": b"ab", "other": b"c"}, 1: {"router": b"d"}}


async def test_the_first_frame_does_not_wait_for_the_interval(wire: Wire) -> None:
    """An urgent frame leaves at once, though the last flush was just now and the interval is long."""
    box = FrameBatcher(wire.publish, wire.append, interval_ms=60_000, limit_bytes=1_000)
    task = asyncio.create_task(box.run())
    one, two = channel(box), channel(box)
    one.put(b"1", urgent=True)
    await wire.until(1)
    one.put(b"later")
    two.put(b"2", urgent=True)
    await wire.until(2)
    assert wire.messages[1][1]["router"] == b"later2"
    task.cancel()


async def test_a_stream_reads_on_only_when_its_frames_are_on_their_way(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """``sent`` waits for the flush that takes the frames: what arrives meanwhile becomes one frame."""
    wire.open.clear()
    one = channel(frame_batcher)
    one.put(b"1", urgent=True)
    await one.sent()
    one.put(b"2")
    waiting = asyncio.create_task(one.sent())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    wire.open.set()
    await asyncio.wait_for(waiting, 5)


async def test_a_full_outbox_holds_all_readers(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Past the byte limit nobody reads on until frames have arrived."""
    wire.open.clear()
    one = channel(frame_batcher)
    one.put(b"x" * 1_000, urgent=True)
    waiting = asyncio.create_task(one.sent())
    await asyncio.sleep(0.02)
    assert frame_batcher.full
    assert not waiting.done()
    wire.open.set()
    await asyncio.wait_for(waiting, 5)
    assert not frame_batcher.full


async def test_a_router_that_does_not_read_holds_its_own_streams_alone(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Their frames are kept and their readers wait, whatever that is in bytes; others go on, and so do they once it
    reads again. Nothing is sent twice or out of order."""
    wire.full = {"stuck"}
    stuck, other = channel(frame_batcher, "stuck"), channel(frame_batcher)
    stuck.put(b"1" * 2_000, urgent=True)
    await wire.until(1)
    waiting = asyncio.create_task(stuck.sent())
    for number in range(3):
        other.put(b"x", urgent=True)
        await asyncio.wait_for(other.sent(), 5)
        await wire.until(2 + number)
    assert stuck.is_held
    assert not other.is_held
    assert not waiting.done()
    assert not frame_batcher.full
    assert all("stuck" not in frames for _, frames in wire.messages[1:])
    stuck.put(b"2")
    wire.full = set()
    await asyncio.wait_for(waiting, 5)
    assert [frames["stuck"] for _, frames in wire.messages if "stuck" in frames] == [b"1" * 2_000, b"1" * 2_000 + b"2"]
    assert not stuck.is_held
    assert await stuck.close() == b""


async def test_what_a_held_stream_kept_goes_with_its_settle(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Its engine was done: nothing of it is lost, and nothing waits for a Router that does not read."""
    wire.full = {"stuck"}
    stuck = channel(frame_batcher, "stuck")
    stuck.put(b"1", urgent=True)
    await eventually(lambda: stuck.is_held, "it is held")
    stuck.put(b"2")
    assert await stuck.close() == b"12"


async def test_a_router_is_held_no_longer_than_somebody_has_frames_for_it(
    frame_batcher: FrameBatcher, wire: Wire
) -> None:
    """The stream whose frames found it full has ended: its neighbour, which has none to try with, goes on."""
    wire.full = {"stuck"}
    first, second = channel(frame_batcher, "stuck"), channel(frame_batcher, "stuck")
    first.put(b"1" * 2_000, urgent=True)
    await eventually(lambda: second.is_held, "both are held")
    first.discard()
    await asyncio.wait_for(second.sent(), 5)
    assert not frame_batcher.full


def test_a_flush_that_is_due_at_once_may_be_brought_forward_on_uvloop() -> None:
    """What is due in less than a millisecond is no timer there, and does not say when it is due."""

    async def scenario() -> None:
        wire = Wire()
        box = FrameBatcher(wire.publish, wire.append, interval_ms=0.3, limit_bytes=1_000)
        task = asyncio.create_task(box.run())
        wire.full = {"stuck"}
        channel(box, "stuck").put(b"1", urgent=True)
        await wire.until(1)
        for count in range(3, 50):
            one, two = channel(box), channel(box)
            one.put(b"2")
            two.put(b"3")
            await box.flush()
            assert not task.done()
            await wire.until(count - 1)
        task.cancel()

    uvloop.run(scenario())


@asynccontextmanager
async def busy(frame_batcher: FrameBatcher, wire: Wire) -> AsyncIterator[None]:
    """One flush follows the other: a stream puts a frame during each."""

    async def stream() -> None:
        other = channel(frame_batcher, "busy")
        while True:
            other.put(b"x", urgent=True)
            await other.sent()
            await asyncio.sleep(0)

    wire.delay_s = 0.01
    task = asyncio.create_task(stream())
    try:
        yield
    finally:
        task.cancel()


async def test_what_is_read_in_steps_waits_for_its_own_flush_alone(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Streams that put frames during each flush, as on a slow way to the queue, do not keep it from its next step."""
    async with busy(frame_batcher, wire):
        await wire.until(2)
        one = channel(frame_batcher)
        one.put(b"1")
        await asyncio.wait_for(frame_batcher.flush(), 5)
        assert [frames["router"] for _, frames in wire.messages if "router" in frames] == [b"1"]
        assert await one.close() == b""


async def test_a_held_stream_is_closed_though_one_flush_follows_the_other(
    frame_batcher: FrameBatcher, wire: Wire
) -> None:
    """Nothing of it is on its way: it waits for none of them."""
    wire.full = {"stuck"}
    stuck = channel(frame_batcher, "stuck")
    async with busy(frame_batcher, wire):
        stuck.put(b"1", urgent=True)
        await eventually(lambda: stuck.is_held, "it is held")
        assert await asyncio.wait_for(stuck.close(), 5) == b"1"


async def test_frames_in_doubt_are_sent_again_before_later_ones(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """A message whose arrival is unknown is repeated with what came after it, in order."""
    wire.failures = 2
    one = channel(frame_batcher)
    one.put(b"1", urgent=True)
    await wire.until(1)
    one.put(b"2")
    await wire.until(3)
    assert wire.messages[-1][1]["router"] == b"12"
    assert not frame_batcher.full
    assert frame_batcher._bytes == 0


async def test_closing_takes_back_what_did_not_arrive(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """What is not known to have arrived goes with the settle; what has, does not."""
    one = channel(frame_batcher)
    one.put(b"1", urgent=True)
    await wire.until(1)
    await one.sent()
    wire.failures = 1
    wire.open.clear()
    one.put(b"2", urgent=True)
    await one.sent()
    one.put(b"3")
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0)
    wire.open.set()
    assert await asyncio.wait_for(closing, 5) == b"23"
    assert frame_batcher._bytes == 0


async def test_closing_while_frames_are_on_their_way_waits_to_hear_that_they_arrived(
    frame_batcher: FrameBatcher, wire: Wire
) -> None:
    """What a flush under way delivers is not sent a second time with the settle."""
    wire.open.clear()
    one = channel(frame_batcher)
    one.put(b"1", urgent=True)
    await one.sent()
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0)
    wire.open.set()
    assert await asyncio.wait_for(closing, 5) == b""


async def test_streams_learn_that_their_router_is_gone(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Only the streams of that Router hear of it."""
    wire.gone = {"router"}
    told: list[str] = []
    mine = frame_batcher.open(0, "router", lambda: told.append("router"))
    other = frame_batcher.open(0, "other", lambda: told.append("other"))
    mine.put(b"1")
    other.put(b"1", urgent=True)
    await wire.until(1)
    await asyncio.wait_for(mine.sent(), 5)
    await eventually(lambda: told, "the stream is told", every_s=0.001)
    assert told == ["router"]


async def test_cancelling_one_stream_leaves_the_others_waiting(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """Each stream waits on its own: an abort of one does not end the wait of its neighbours."""
    wire.open.clear()
    first = channel(frame_batcher)
    first.put(b"1", urgent=True)
    await first.sent()
    one, two = channel(frame_batcher), channel(frame_batcher)
    one.put(b"a")
    two.put(b"b")
    waits = [asyncio.create_task(one.sent()), asyncio.create_task(two.sent())]
    await asyncio.sleep(0)
    waits[0].cancel()
    one.discard()
    wire.open.set()
    await asyncio.wait_for(waits[1], 5)
    await wire.until(2)
    assert wire.messages[1][1]["router"] == b"b"


def stored(frame_batcher: FrameBatcher, lost: list[str] | None = None) -> tuple[Lease, FrameSender]:
    """A lease of a persisted job, and the channel to its output."""
    lease = Lease(make_job(persisted=True), 1, "a1", 1, 60_000, 0)
    return lease, frame_batcher.open_persisted(lease, lambda: (lost if lost is not None else []).append(lease.job.id))


async def test_frames_of_stored_jobs_are_added_to_their_output(frame_batcher: FrameBatcher, wire: Wire) -> None:
    """They go with the same flush as those for Routers, each job's to its own output."""
    wire.open.clear()
    channel(frame_batcher).put(b"0", urgent=True)
    await asyncio.sleep(0)
    (one, first), (two, second) = stored(frame_batcher), stored(frame_batcher)
    first.put(b"1")
    first.put(b"2")
    second.put(b"3")
    channel(frame_batcher).put(b"4")
    wire.open.set()
    await eventually(lambda: len(wire.appended) == 2, "both are kept", every_s=0.001)
    assert sorted(wire.appended) == sorted([(one.job.id, b"12"), (two.job.id, b"3")])
    await wire.until(2)
    assert wire.messages[-1] == (0, {"router": b"4"})


async def test_stored_frames_in_doubt_are_sent_again_or_go_with_the_settle(
    frame_batcher: FrameBatcher, wire: Wire
) -> None:
    """What may not have arrived is sent again with what came since; what is left at the end is given back."""
    wire.failures = 1
    lease, channel = stored(frame_batcher)
    channel.put(b"1", urgent=True)
    await eventually(lambda: len(wire.appended) == 2, "it is sent again", every_s=0.001)
    assert wire.appended == [(lease.job.id, b"1")] * 2
    assert await channel.close() == b""
    wire.failures = 10_000
    lease, channel = stored(frame_batcher)
    channel.put(b"5", urgent=True)
    await eventually(lambda: len(wire.appended) == 3, "it is sent", every_s=0.001)
    channel.put(b"6")
    assert await channel.close() == b"56"


@pytest.mark.parametrize("answer", [Settled.FENCED, Settled.GONE, Settled.DUPLICATE])
async def test_an_attempt_learns_that_its_stored_job_is_lost(
    frame_batcher: FrameBatcher, wire: Wire, answer: Settled
) -> None:
    """An append that is refused stops the attempt, once."""
    wire.answer = answer
    lost: list[str] = []
    lease, channel = stored(frame_batcher, lost)
    channel.put(b"1", urgent=True)
    await eventually(lambda: lost == [lease.job.id], "it is told", every_s=0.001)
