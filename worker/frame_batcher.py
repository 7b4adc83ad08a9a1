"""The frame batcher: send the frames of all running streams together, one message per Router and flush.

One flush runs at a time: frames that arrive during it go with the next. A stream's first frame does not wait for
others; nor do those that were read together, an engine's step (:mod:`worker.engines.step_reader`). Other frames wait
until a few milliseconds after the last flush began.

Engines are not read while frames are on their way: what they send meanwhile is one read and one frame, however many
tokens it is. While Redis is away frames are kept, up to a limit at which reading stops and TCP slows the engines;
frames that may not have arrived are sent again, and a Router drops repeats by their number.

A Router that does not read holds up its own streams alone: once its reply stream is full they are held. Nothing of them
is sent but a try now and then, and their engines are not read.

Frames of a persisted job do not go to a Router but are added to the job's output, which the queue sends on; repeats are
dropped there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NoReturn

from broker import Undelivered
from queue_schemas import InferqError, Lease, Settled, shard_of_job
from telemetry import get_logger
from telemetry.backoff import Backoff

_BACKOFF = Backoff(0.05, 1.0)
HELD_S = 0.25
"""How long after a Router was found not to read it is tried again."""

Publish = Callable[[int, Mapping[str, bytes]], Awaitable[Mapping[str, Undelivered]]]
"""``broker.attempts.publish``: sends packed frames by Router on one shard, answers those that did not get theirs."""

Append = Callable[[Lease, bytes], Awaitable[Settled]]
"""``broker.attempts.append``: adds packed frames to a persisted job's output; concurrent calls share a round trip."""

log = get_logger(__name__)


class FrameSender:
    """Sends the frames of one attempt to its Router, or to its persisted job's output. Close it when the attempt ends.

    ``lost`` is called when nobody takes the frames: the Router is gone, or the attempt has lost its job.
    """

    __slots__ = ("_frame_batcher", "_in_flight", "_lost", "_waiting", "lease", "reply_to", "shard")

    def __init__(
        self,
        frame_batcher: FrameBatcher,
        shard: int,
        reply_to: str,
        lost: Callable[[], None],
        lease: Lease | None = None,
    ) -> None:
        self.shard = shard
        self.reply_to = reply_to
        self.lease = lease
        self._frame_batcher = frame_batcher
        self._lost = lost
        self._waiting: list[bytes] = []
        self._in_flight = b""

    def put(self, frames: bytes, *, urgent: bool = False) -> None:
        """Hand over packed frames for the next flush, which starts at once if they are ``urgent``."""
        self._waiting.append(frames)
        self._frame_batcher.accept(self, len(frames), urgent)

    @property
    def is_held(self) -> bool:
        """Whether its Router does not read, so that the engine is not to be read either."""
        return self._frame_batcher.is_held(self)

    async def sent(self) -> None:
        """Wait until everything handed over is on its way, its Router reads, and the frame batcher holds less than its
        limit."""
        while self._waiting or self.is_held:
            await (self._frame_batcher.flush_ended() if self.is_held else self._frame_batcher.flush_begun())
        while self._frame_batcher.full:
            await self._frame_batcher.flush_ended()

    async def close(self) -> bytes:
        """Take back, in order, the frames that are not known to have arrived: they go with the settle."""
        while self._frame_batcher.is_sending(self):
            await self._frame_batcher.flush_ended()
        rest = self._in_flight + b"".join(self._waiting)
        self.discard()
        return rest

    def discard(self) -> None:
        """Forget what has not been sent: the attempt ends without an answer."""
        self._frame_batcher.forget(self, self.size)
        self._in_flight = b""
        self._waiting.clear()

    def begin_flight(self) -> bytes:
        """All frames that are not known to have arrived, which a flush sends now."""
        if self._waiting:
            self._in_flight += b"".join(self._waiting)
            self._waiting.clear()
        return self._in_flight

    @property
    def is_in_flight(self) -> bool:
        """Whether there are frames that a flush sends, or has sent without knowing whether they arrived."""
        return bool(self._in_flight)

    @property
    def size(self) -> int:
        """Bytes of frames that are not known to have arrived."""
        return len(self._in_flight) + sum(map(len, self._waiting))

    def end_flight(self, *, lost: bool) -> int:
        """The frames of the last flight arrived, or nobody takes them (``lost``): how many bytes they were. 0 if they
        were taken back meanwhile."""
        size = len(self._in_flight)
        if size:
            self._in_flight = b""
            if lost:
                self._lost()
        return size


class FrameBatcher:
    """Collects and flushes. ``interval_ms`` is the least time between flushes of frames that come one by one,
    ``limit_bytes`` how much may wait."""

    def __init__(self, publish: Publish, append: Append, *, interval_ms: float, limit_bytes: int) -> None:
        self._publish = publish
        self._append = append
        self._interval_s = interval_ms / 1000
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._senders: dict[FrameSender, None] = {}
        """Those that have frames for the next flush."""
        self._held: dict[tuple[int, str], float] = {}
        """Routers that do not read, by shard: when they are tried again."""
        self._held_bytes = 0
        self._flushes = 0
        """How many have begun."""
        self._flight: dict[FrameSender, None] = {}
        """Those whose frames the flush that runs sends."""
        self._wanted = asyncio.Event()
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0
        """When it fires: what is due within half a millisecond is no timer to uvloop, and does not say."""
        self._flushed_at = 0.0
        self._until_begun: list[asyncio.Future[None]] = []
        self._until_ended: list[asyncio.Future[None]] = []

    @property
    def full(self) -> bool:
        """Whether readers of engines should pause."""
        return self._bytes - self._held_bytes >= self._limit_bytes

    def is_held(self, sender: FrameSender) -> bool:
        """Whether the Router of ``sender`` does not read."""
        return bool(self._held) and sender.lease is None and (sender.shard, sender.reply_to) in self._held

    def is_sending(self, sender: FrameSender) -> bool:
        """Whether the flush that runs sends frames of ``sender``."""
        return sender in self._flight

    def open(self, shard: int, reply_to: str, gone: Callable[[], None]) -> FrameSender:
        """A sender for one stream; ``gone`` is called when its Router turns out to be gone."""
        return FrameSender(self, shard, reply_to, gone)

    def open_persisted(self, lease: Lease, fenced: Callable[[], None]) -> FrameSender:
        """A sender to a persisted job's output; ``fenced`` is called when the attempt turns out to have lost its
        job."""
        return FrameSender(self, shard_of_job(lease.job.id), "", fenced, lease)

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

    async def flush(self) -> None:
        """Send what there is now, and wait until it arrived or a try has failed, and less than the limit is left."""
        last = self._flushes
        if self._senders:
            self._wanted.set()
            last += 1
        # Others' frames may have the next flush follow at once: it is not waited for.
        while self._flushes < last or (self._flushes == last and self._flight) or self.full:
            await self.flush_ended()

    async def flush_begun(self) -> None:
        """Wait until the next flush begins."""
        await _one_of(self._until_begun)

    async def flush_ended(self) -> None:
        """Wait until the flush that runs, or the next one, ends."""
        await _one_of(self._until_ended)

    def accept(self, sender: FrameSender, size: int, urgent: bool) -> None:
        """``sender`` has got ``size`` bytes of frames, for its next flight."""
        self._bytes += size
        if self.is_held(sender):
            self._held_bytes += size
        self._senders[sender] = None
        if urgent:
            self._wanted.set()
        elif (self._timer is None or self._held) and not self._wanted.is_set():
            self._flush_at(self._flushed_at + self._interval_s)

    def forget(self, sender: FrameSender, size: int) -> None:
        """``sender`` has dropped its frames, ``size`` bytes."""
        self._bytes -= size
        if self.is_held(sender):
            self._held_bytes = max(self._held_bytes - size, 0)
        self._senders.pop(sender, None)

    async def _flush(self) -> bool:
        """Send what there is; False if some of it may not have arrived and has to be sent again."""
        self._flushes += 1
        sending = self._take_due()
        shards: dict[int, dict[str, list[bytes]]] = {}
        persisted: list[tuple[FrameSender, Lease, bytes]] = []
        for sender in sending:
            frames = sender.begin_flight()
            if sender.lease is None:
                shards.setdefault(sender.shard, {}).setdefault(sender.reply_to, []).append(frames)
            else:
                persisted.append((sender, sender.lease, frames))
        if not sending:
            _notify(self._until_ended)
            return True
        self._flight = sending
        _notify(self._until_begun)
        try:
            packed = [(shard, {to: b"".join(f) for to, f in replies.items()}) for shard, replies in shards.items()]
            if len(packed) == 1 and not persisted:
                results = [await self._send(*packed[0])]
                appended: list[Settled | None] = []
            else:
                results, appended = await asyncio.gather(
                    asyncio.gather(*(self._send(shard, frames) for shard, frames in packed)),
                    asyncio.gather(*(self._append_frames(lease, frames) for _, lease, frames in persisted)),
                )
        finally:
            self._flight = {}
        by_shard = {shard: undelivered for (shard, _), undelivered in zip(packed, results, strict=True)}
        self._note_held(shards, by_shard)
        answers = {sender: answer for (sender, _, _), answer in zip(persisted, appended, strict=True)}
        for sender in sending:
            if sender.lease is None:
                undelivered = by_shard[sender.shard]
                lost = None if undelivered is None or self.is_held(sender) else sender.reply_to in undelivered
            else:
                answer = answers[sender]
                lost = None if answer is None else answer is not Settled.OK
            if lost is not None:
                self._bytes -= sender.end_flight(lost=lost)
            elif sender.is_in_flight:
                self._senders[sender] = None
        self._held_bytes = sum(sender.size for sender in self._senders if self.is_held(sender)) if self._held else 0
        _notify(self._until_ended)
        return None not in results and None not in appended

    def _take_due(self) -> dict[FrameSender, None]:
        """Those that have frames, but for those whose Router does not read and is not to be tried again yet. One that
        is to be tried, and of which nobody has frames, is held no more: nothing else would show that it reads."""
        sending, self._senders = self._senders, {}
        if not self._held:
            return sending
        now = asyncio.get_running_loop().time()
        for sender in list(sending):
            if self.is_held(sender) and self._held[sender.shard, sender.reply_to] > now:
                self._senders[sender] = sending.pop(sender)
        tried = {(sender.shard, sender.reply_to) for sender in sending}
        for key, retry_at in list(self._held.items()):
            if retry_at > now:
                self._flush_at(retry_at)
            elif key not in tried:
                del self._held[key]
        return sending

    def _note_held(
        self, sent: Mapping[int, Iterable[str]], by_shard: Mapping[int, Mapping[str, Undelivered] | None]
    ) -> None:
        """Note which Routers do not read, and which do again."""
        if not self._held and not any(by_shard.values()):
            return
        retry_at = asyncio.get_running_loop().time() + HELD_S
        for shard, undelivered in by_shard.items():
            for reply_to in sent[shard] if undelivered is not None else ():
                key = (shard, reply_to)
                if undelivered and undelivered.get(reply_to) is Undelivered.FULL:
                    if key not in self._held:
                        log.warning("router_does_not_read", router=reply_to, shard=shard, then="its streams are held")
                    self._held[key] = retry_at
                elif self._held.pop(key, None) is not None:
                    log.info("router_reads_again", router=reply_to, shard=shard)
        if self._held:
            self._flush_at(min(self._held.values()))

    async def _send(self, shard: int, frames: Mapping[str, bytes]) -> Mapping[str, Undelivered] | None:
        try:
            return await self._publish(shard, frames)
        except InferqError as error:
            log.warning("frames_not_sent", shard=shard, error=error.message)
            return None

    async def _append_frames(self, lease: Lease, frames: bytes) -> Settled | None:
        try:
            return await self._append(lease, frames)
        except InferqError as error:
            log.warning("frames_not_appended", job_id=lease.job.id, error=error.message)
            return None

    def _flush_at(self, due: float) -> None:
        """Flush at that time of the loop at the latest."""
        loop = asyncio.get_running_loop()
        if due <= loop.time():
            self._wanted.set()
        elif self._timer is None or self._timer_due > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_due = loop.call_at(due, self._flush_now), due

    def _flush_now(self) -> None:
        self._timer = None
        self._wanted.set()


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
