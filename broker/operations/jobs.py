"""Put jobs on the queue, resume and cancel them: what Routers and the batcher call for the jobs they wait for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from queue_schemas import (
    BrokerUnavailable,
    Enqueued,
    Job,
    JobId,
    Lane,
    PersistOptions,
    ShardKeys,
    State,
    shard_of_job,
)
from queue_schemas.keys import keys_of_job
from scheduling.prediction import Place

from ..redis.calls import Caller
from .job_batches import ShardBatches
from .replies import Replies


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The state of a job and its current attempt. ``attempt_id`` is empty unless the job runs."""

    state: State
    epoch: int
    attempt_id: str


class Jobs:
    """The jobs of Routers and of the batcher. ``durable``: per shard, batches whose jobs are on the server's disk
    before they count as enqueued; empty where memory is enough."""

    def __init__(
        self,
        caller: Caller,
        keys: Sequence[ShardKeys],
        batches: Sequence[ShardBatches],
        durable: Sequence[Sequence[ShardBatches]],
        replies: Replies,
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._batches = batches
        self._durable = durable
        self._replies = replies
        self._next_durable = itertools.count()

    async def enqueue(self, job: Job) -> State:
        """Put ``job`` on its queue. Returns ``QUEUED``, or the state of a job of that id that is already known
        (``CANCELLED`` for one that was cancelled before it came).

        Raises ``OverCapacity``, ``BrokerFull``, and ``NotOnDisk`` for background jobs where durability is disk.
        """
        return (await self.start_enqueue(job)).state

    def start_enqueue(self, job: Job, patience_ms: int | None = None) -> asyncio.Future[Enqueued]:
        """The same as :meth:`enqueue`, without waiting: the future's result has the state, and how long the job is
        thought to wait.

        A job that is thought to wait for more than ``patience_ms`` is refused with ``WaitTooLong``; with 0, one that
        finds no free slot; with None, none.
        """
        return self._batches_for(job).enqueue(job, patience_ms=patience_ms)

    async def places(self, job_ids: Sequence[JobId]) -> list[Place | None]:
        """Where jobs of one shard stand in their queues; None for those that do not wait."""
        keys = keys_of_job(self._keys, job_ids[0])
        found = await self._caller.script("place", keys.budget, keys.prefix, *job_ids)
        return [Place(place[0], place[1] if place[1] >= 0 else None) if place else None for place in found]

    async def enqueue_persisted(
        self,
        job: Job,
        options: PersistOptions | None = None,
        listener: str = "",
        patience_ms: int | None = None,
    ) -> Enqueued:
        """Put a persisted ``job`` on its queue, or find the job that holds its idempotency key.

        ``options`` say what is kept of it, by default its answer for a day. ``listener`` is the session id of the
        Router that its output is sent to; for an earlier job found by its key, call ``output.attach``. Raises like
        :meth:`enqueue`, and ``IdempotencyKeyReused`` if the key belongs to another request.
        """
        return await self._batches_for(job).enqueue(job, listener, options, patience_ms)

    async def resume(self, job: Job, epoch: int) -> State | None:
        """Put a stream that was lost under ``epoch`` back on its queue with ``job`` as its envelope, whose ``prefix``
        says what was delivered.

        Returns ``QUEUED``, also when repeated, or the job's state if it is another one (``LOST``: under a later epoch);
        None for an unknown job.
        """
        keys = keys_of_job(self._keys, job.id)
        return state_or_none(await self._caller.script("resume", keys.budget, keys.prefix, job.id, epoch, job.pack()))

    async def raise_epoch(self, job_id: JobId, highest_seen_epoch: int) -> JobStatus | None:
        """The status of a job after Redis may have lost its latest writes; None if it is unknown.

        If the job waits, its epoch is raised above ``highest_seen_epoch`` (0: the caller has seen none), and
        above all that may have been given out since, so that late frames of lost attempts are recognized.
        """
        keys = keys_of_job(self._keys, job_id)
        found = await self._caller.script("raise_epoch", keys.budget, keys.prefix, job_id, highest_seen_epoch)
        state, epoch, attempt_id = found
        return None if state == b"unknown" else JobStatus(State(state.decode()), int(epoch), attempt_id.decode())

    async def cancel(
        self, job_id: JobId, reason: str, *, if_orphaned: bool = False, if_queued: bool = False, used: int = 0
    ) -> State | None:
        """Cancel a job. Returns the state it was in, None if it is unknown (a later enqueue of it is void then).
        ``if_orphaned`` leaves persisted and unknown jobs alone; ``if_queued`` all that do not wait on the queue.
        ``used``: what of its answer was delivered has cost (:mod:`scheduling.cost`); its tenant is charged no less."""
        keys = keys_of_job(self._keys, job_id)
        condition = 2 if if_queued else int(if_orphaned)
        return state_or_none(
            await self._caller.script("cancel", keys.budget, keys.prefix, job_id, reason, condition, 0, used)
        )

    async def cancel_abandoned(self, job_id: JobId, reason: str, after_ms: int) -> State | None:
        """Cancel a persisted job if no Router has listened to it for ``after_ms``. Returns the state it was in, None if
        it is unknown."""
        keys = keys_of_job(self._keys, job_id)
        return state_or_none(
            await self._caller.script("cancel", keys.budget, keys.prefix, job_id, reason, 0, after_ms, 0)
        )

    def _batches_for(self, job: Job) -> ShardBatches:
        """The batches that enqueue ``job``. Raises ``BrokerUnavailable`` where its answer could not be received."""
        shard = shard_of_job(job.id)
        if shard in self._replies.missing:
            raise BrokerUnavailable(
                "the part of the queue's Redis that holds this model has not been reached yet; try again shortly",
                retry_after_s=2,
            )
        if self._durable and not _is_awaited(job):
            candidates = self._durable[shard]
            return candidates[next(self._next_durable) % len(candidates)]
        return self._batches[shard]


def state_or_none(found: bytes) -> State | None:
    """The state in a script's reply; None for a job that is unknown."""
    return None if found == b"unknown" else State(found.decode())


def _is_awaited(job: Job) -> bool:
    """Whether a client waits for the answer, so that its Router enqueues the job again if Redis loses it."""
    return job.lane is Lane.INTERACTIVE and not (job.persisted and job.idempotency_key)
