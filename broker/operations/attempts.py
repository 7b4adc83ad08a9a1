"""A running attempt's calls: send its output, settle or release it, report the crash of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from enum import Enum, auto

from queue_schemas import Frame, Job, Lease, Outcome, Settled, ShardKeys, shard_of_job, unpack_frames
from queue_schemas.keys import keys_of_job

from ..redis.calls import Caller
from ..redis.shards import answers_of, on_each
from .job_batches import ShardBatches, attempt_of

_CHECKS_PER_LIMIT = 16
"""How often the length of a reply stream is asked for while one worker sends as much as it may hold."""
_MAX_ROUTERS_REMEMBERED = 10_000
ENTRY_BYTES = 1 << 20
"""What is longer is cut between frames, as far as they allow it: a Router reads an entry of its reply stream whole, and
has the time of one call for it, however slow its way to Redis is."""


class Undelivered(Enum):
    """Why a Router was not sent what was published to it."""

    GONE = auto()
    """It has left or died: nobody waits for its answers."""
    FULL = auto()
    """It does not read: its reply stream holds as much as it may. Publish again in a while."""


class Attempts:
    """The attempts that a worker runs, each named by its lease. Concurrent calls share round trips. ``max_reply_bytes``
    is what a Router's reply stream may hold on a shard."""

    def __init__(
        self, caller: Caller, keys: Sequence[ShardKeys], batches: Sequence[ShardBatches], max_reply_bytes: int
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._batches = batches
        self._max_reply_bytes = max_reply_bytes
        self._check_every_bytes = max_reply_bytes // _CHECKS_PER_LIMIT
        self._unchecked_bytes: dict[str, int] = {}
        """By reply stream: what this worker has sent there since it last asked how much it holds."""

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> dict[str, Undelivered]:
        """Send packed frames to Routers (``reply_to`` -> bytes) and answer those that did not get theirs, and why.

        One try: on ``BrokerUnavailable`` the frames may or may not have arrived; sending them again is harmless,
        because a Router drops repeats by ``seq``.
        """
        keys = self._keys[shard]

        async def send(reply_to: str, packed: bytes) -> Undelivered | None:
            key = keys.reply(reply_to)
            if await self._is_full(key, len(packed)):
                return Undelivered.FULL
            for entry in [packed] if len(packed) <= ENTRY_BYTES else _entries(packed):
                if await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", "f", entry) is None:
                    return Undelivered.GONE
            return None

        if len(frames) == 1:  # as mostly: no task for it
            ((reply_to, packed),) = frames.items()
            undelivered = await send(reply_to, packed)
            return {} if undelivered is None else {reply_to: undelivered}
        answers = await asyncio.gather(*(send(reply_to, packed) for reply_to, packed in frames.items()))
        return {reply_to: answer for reply_to, answer in zip(frames, answers, strict=True) if answer is not None}

    async def _is_full(self, key: str, size: int) -> bool:
        """Whether a reply stream holds more than it may. The server is asked once for many bytes sent, and each time
        while it does: what all workers send beyond the limit is small beside it."""
        unchecked, is_full = self._unchecked_bytes.get(key, 0) + size, False
        if unchecked >= self._check_every_bytes:
            used = await self._caller.once(key, "MEMORY", "USAGE", key, "SAMPLES", 0)
            is_full = (used or 0) > self._max_reply_bytes
            unchecked = self._check_every_bytes if is_full else 0
        if len(self._unchecked_bytes) >= _MAX_ROUTERS_REMEMBERED:
            self._unchecked_bytes.clear()
        self._unchecked_bytes[key] = unchecked
        return is_full

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        """Add packed frames of an attempt to its persisted job's output, and send them to those who listen. ``OK`` also
        for frames that are there already. One try: on ``BrokerUnavailable`` they may or may not be there; sending them
        again is harmless."""
        return await self._batches[shard_of_job(lease.job.id)].append(lease, frames)

    async def settle(
        self,
        lease: Lease,
        outcome: Outcome,
        frames: bytes = b"",
        *,
        used: int | None = None,
        run_ms: int | None = None,
    ) -> Settled:
        """End an attempt with its answer. ``frames`` (packed; those not yet published, the last with END) reach the
        Router, or those who listen to a persisted job, only if the answer is ``OK``. ``used`` is what the attempt has
        cost (:mod:`scheduling.cost`), ``run_ms`` how long it has had its slot; None: unknown."""
        return await self._batches[shard_of_job(lease.job.id)].settle(lease, outcome, frames, used, run_ms)

    async def release(self, lease: Lease, reason: str, *, counted: bool, avoid_ms: int | None = None) -> Settled:
        """End an attempt without an answer: the job waits again, ahead of new work.

        ``counted``: the attempt is spent, this worker is avoided for ``avoid_ms`` (None: two seconds), and a job whose
        attempts are used up becomes a dead letter. Otherwise it is handed back as if never started.
        """
        return await self._batches[shard_of_job(lease.job.id)].release(lease, reason, counted, avoid_ms)

    async def release_yielded(self, lease: Lease, reason: str, following: Job | None = None) -> Settled:
        """End an attempt that yields its slot: the job waits again, ahead of new work and uncounted. ``following``: the
        job as its next attempt is to run it, behind what it said; None: unchanged."""
        return await self._batches[shard_of_job(lease.job.id)].release_yielded(lease, reason, following)

    async def decline_to_yield(self, lease: Lease, *, for_now: bool, region: str = "") -> None:
        """Say that an attempt at a worker of ``region`` ('' for none) that was asked to yield runs on, so that another
        one is asked for what waits next. It is asked again after all others (``for_now``), or not at all."""
        keys, job_id = keys_of_job(self._keys, lease.job.id), lease.job.id
        for key in {keys.yieldable(lease.job.model), keys.yieldable(lease.job.model, region)}:
            await self._caller.once(key, *(("ZADD", key, "XX", 1, job_id) if for_now else ("ZREM", key, job_id)))

    async def report_crash(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        """End all attempts that ran on an engine that crashed, in one call per shard.

        Which job did it cannot be known: if there are suspects among them, each of those is charged an attempt, else
        every job. All are suspects from now on: a worker is given one of them at a time.
        """
        answers: dict[str, Settled] = {}

        async def end(keys: ShardKeys) -> None:
            here = [lease for lease in leases if shard_of_job(lease.job.id) == keys.shard]
            if here:
                attempts = [part for lease in here for part in (*attempt_of(lease), "crashed", reason, "")]
                found = await self._caller.script("release", keys.budget, keys.prefix, *attempts)
                for lease, answer in zip(here, found, strict=True):
                    answers[lease.attempt_id] = Settled(answer.decode())

        answers_of(await on_each(self._keys, end))
        return [answers[lease.attempt_id] for lease in leases]

    async def clear_suspicion(self, lease: Lease) -> Settled:
        """Clear a running job of suspicion: it has put out more than before its engine crashed."""
        keys = keys_of_job(self._keys, lease.job.id)
        return Settled(
            (await self._caller.script("clear_suspicion", keys.budget, keys.prefix, *attempt_of(lease))).decode()
        )


def _entries(packed: bytes) -> list[bytes]:
    """Packed frames as entries of a reply stream, in order."""
    entries: list[bytes] = []
    entry: list[bytes] = []
    size = 0
    for frame in map(Frame.pack, unpack_frames(packed)):
        if entry and size + len(frame) > ENTRY_BYTES:
            entries.append(b"".join(entry))
            entry, size = [], 0
        entry.append(frame)
        size += len(frame)
    return [*entries, b"".join(entry)]
