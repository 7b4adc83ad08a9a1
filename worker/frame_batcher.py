"""The frame batcher: send the frames of all running streams together, one message per Router and flush.

One flush runs at a time: frames that arrive during it, and for a few milliseconds after it began, go with the next. A
stream's first frame does not wait for others.

A stream that put frames here waits until they are on their way before it reads on (:meth:`Channel.sent`): what its
engine sends meanwhile is one read and one frame, however many tokens it is. While Redis is away frames are kept, up to
a limit at which reading stops and TCP slows the engines; frames that may not have arrived are sent again, and a
Router drops repeats by their number.

Frames of a persisted job do not go to a Router but are added to the job's output, which the queue sends on; repeats are
dropped there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

from queue_schemas import InferqError, Lease, Settled, shard_of_job
from telemetry import get_logger
from telemetry.backoff import Backoff

_BACKOFF = Backoff(0.05, 1.0)

Publish = Callable[[int, Mapping[str, bytes]], Awaitable[set[str]]]
"""``broker.attempts.publish``: sends packed frames by Router on one shard, answers the Routers that are gone."""

Append = Callable[[Lease, bytes], Awaitable[Settled]]
"""``broker.attempts.append``: adds packed frames to a persisted job's output; concurrent calls share a round trip."""

log = get_logger(__name__)


class Channel:
    """The way of one running stream to its Router, or to its persisted job's output. Close it when the attempt ends."""

    __slots__ = ("_frame_batcher", "_gone", "_in_flight", "_waiting", "lease", "reply_to", "shard")

    def __init__(
        self,
        frame_batcher: FrameBatcher,
        shard: int,
        reply_to: str,
        gone: Callable[[], None],
        lease: Lease | None = None,
    ) -> None:
        self.shard = shard
        self.reply_to = reply_to
        self.lease = lease
        self._frame_batcher = frame_batcher
        self._gone = gone
        self._waiting: list[bytes] = []
        self._in_flight = b""

    def put(self, frames: bytes, *, urgent: bool = False) -> None:
        """Hand over packed frames for the next flush, which starts at once if they are ``urgent``."""
        self._waiting.append(frames)
        self._frame_batcher._accept(self, len(frames), urgent)

    async def sent(self) -> None:
        """Wait until everything handed over is on its way, and the frame batcher holds less than its limit."""
        while self._waiting:
            await _one_of(self._frame_batcher._until_taken)
        while self._frame_batcher.full:
            await _one_of(self._frame_batcher._until_done)

    async def close(self) -> bytes:
        """Take back, in order, the frames that are not known to have arrived: they go with the settle."""
        frame_batcher = self._frame_batcher
        while self._in_flight and frame_batcher._publishing:
            await _one_of(frame_batcher._until_done)
        rest = self._in_flight + b"".join(self._waiting)
        self.discard()
        return rest

    def discard(self) -> None:
        """Forget what has not been sent: the attempt ends without an answer."""
        self._frame_batcher._forget(self, len(self._in_flight) + sum(map(len, self._waiting)))
        self._in_flight = b""
        self._waiting.clear()


class FrameBatcher:
    """Collects and flushes. ``interval_ms`` is the least time between flushes, ``limit_bytes`` how much may wait."""

    def __init__(self, publish: Publish, append: Append, *, interval_ms: float, limit_bytes: int) -> None:
        self._publish = publish
        self._append = append
        self._interval_s = interval_ms / 1000
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._channels: dict[Channel, None] = {}
        self._wanted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_at = 0.0
        self._until_taken: list[asyncio.Future[None]] = []
        self._until_done: list[asyncio.Future[None]] = []
        self._publishing = False

    @property
    def full(self) -> bool:
        """Whether readers of engines should pause."""
        return self._bytes >= self._limit_bytes

    def open(self, shard: int, reply_to: str, gone: Callable[[], None]) -> Channel:
        """A channel for one stream; ``gone`` is called when its Router turns out to be gone."""
        return Channel(self, shard, reply_to, gone)

    def open_persisted(self, lease: Lease, fenced: Callable[[], None]) -> Channel:
        """A channel to a persisted job's output; ``fenced`` is called when the attempt turns out to have lost its
        job."""
        return Channel(self, shard_of_job(lease.job.id), "", fenced, lease)

    async def run(self) -> NoReturn:
        """Flush until cancelled."""
        failures = 0
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._flushed_at = asyncio.get_running_loop().time()
            if await self._flush():
                failures = 0
                continue
            failures += 1
            await asyncio.sleep(_BACKOFF.pause_s(failures))
            self._wanted.set()

    async def _flush(self) -> bool:
        """Send what there is; False if some of it may not have arrived and has to be sent again."""
        shards: dict[int, dict[str, list[bytes]]] = {}
        persisted: list[Channel] = []
        sending = list(self._channels)
        for channel in sending:
            if channel._waiting:
                channel._in_flight += b"".join(channel._waiting)
                channel._waiting.clear()
            if channel.lease is None:
                shards.setdefault(channel.shard, {}).setdefault(channel.reply_to, []).append(channel._in_flight)
            else:
                persisted.append(channel)
        if not sending:
            return True
        self._publishing = True
        _notify(self._until_taken)
        try:
            packed = [(shard, {to: b"".join(f) for to, f in replies.items()}) for shard, replies in shards.items()]
            if len(packed) == 1 and not persisted:
                results = [await self._send(*packed[0])]
                appended: list[Settled | None] = []
            else:
                results, appended = await asyncio.gather(
                    asyncio.gather(*(self._send(shard, frames) for shard, frames in packed)),
                    asyncio.gather(*map(self._append_frames, persisted)),
                )
        finally:
            self._publishing = False
        gone_by_shard = {shard: gone for (shard, _), gone in zip(packed, results, strict=True)}
        for channel in sending:
            gone = gone_by_shard[channel.shard] if channel.lease is None else None
            if gone is not None:
                self._arrived(channel, lost=channel.reply_to in gone)
        for channel, answer in zip(persisted, appended, strict=True):
            if answer is not None:
                self._arrived(channel, lost=answer is not Settled.OK)
        _notify(self._until_done)
        return None not in results and None not in appended

    async def _send(self, shard: int, frames: Mapping[str, bytes]) -> set[str] | None:
        try:
            return await self._publish(shard, frames)
        except InferqError as error:
            log.warning("frames_not_sent", shard=shard, error=error.message)
            return None

    async def _append_frames(self, channel: Channel) -> Settled | None:
        assert channel.lease is not None  # noqa: S101 - only those of persisted jobs
        try:
            return await self._append(channel.lease, channel._in_flight)
        except InferqError as error:
            log.warning("frames_not_appended", job_id=channel.lease.job.id, error=error.message)
            return None

    def _arrived(self, channel: Channel, *, lost: bool) -> None:
        if channel in self._channels:
            self._bytes -= len(channel._in_flight)
            channel._in_flight = b""
            if not channel._waiting:
                del self._channels[channel]
            if lost:
                channel._gone()

    def _accept(self, channel: Channel, size: int, urgent: bool) -> None:
        self._bytes += size
        self._channels[channel] = None
        if urgent:
            self._wanted.set()
        elif self._timer is None and not self._wanted.is_set():
            due = self._flushed_at + self._interval_s
            loop = asyncio.get_running_loop()
            if due <= loop.time():
                self._wanted.set()
            else:
                self._timer = loop.call_at(due, self._flush_now)

    def _flush_now(self) -> None:
        self._timer = None
        self._wanted.set()

    def _forget(self, channel: Channel, size: int) -> None:
        self._bytes -= size
        self._channels.pop(channel, None)


async def _one_of(waiters: list[asyncio.Future[None]]) -> None:
    # A future of its own: cancelling one attempt must not end the wait of the others.
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    await waiter


def _notify(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
