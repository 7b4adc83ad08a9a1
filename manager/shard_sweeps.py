"""The acting Manager's regular work on the queue, shard by shard: renewal counters, deadlines, jobs of the dead.

A shard that does not answer stops no other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from broker import Expired, Reclaimed
from queue_schemas import InferqError, SessionId, ShardedLeaseWatch
from telemetry import get_logger
from telemetry.backoff import Backoff

from .metrics import FleetMetrics
from .ports import Clock, QueuePort, call_queue
from .settings import ManagerSettings

RECLAIM_CONCURRENCY = 16
MAX_RECLAIMED_REMEMBERED = 4096
"""How many reclaimed sessions are known as such, for a worker that comes back under its id."""
_POLL_UNREACHABLE = Backoff(1.0, 8.0)

log = get_logger(__name__)


class ShardSweeps:
    """Polls, expires and reclaims on the shards of one term. One that does not answer is left out of the sweeps, and
    polled beside them, with growing pauses, until it does: however long it stays silent, the others do not wait."""

    def __init__(self, settings: ManagerSettings, queue: QueuePort, metrics: FleetMetrics, clock: Clock) -> None:
        self._timeout_ms = settings.broker_timeout_ms
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        self._watch = ShardedLeaseWatch(settings.lease_ms / 1000, queue.shards)
        self._counters: dict[int, dict[SessionId, int]] = {}
        self._unreachable: dict[int, InferqError] = {}
        self._polling_unreachable: dict[int, asyncio.Task[None]] = {}
        self._to_reclaim: dict[SessionId, _Dead] = {}
        self._reclaimed: dict[SessionId, None] = {}

    @property
    def unreachable(self) -> set[int]:
        """The shards that do not answer now."""
        return set(self._unreachable)

    def close(self) -> None:
        """Poll no shard any more."""
        for task in self._polling_unreachable.values():
            task.cancel()
        self._polling_unreachable.clear()

    # Renewal counters

    def has_counter(self, session_id: SessionId) -> bool:
        """Whether the session had a renewal counter at the last poll."""
        return session_id in self._watch

    async def poll(self) -> set[SessionId]:
        """Read the renewal counters: the sessions that have one. Raises if no shard answers."""
        shards = range(self._queue.shards)
        await asyncio.gather(*(self._poll(shard) for shard in self._present()))
        if len(self._unreachable) == len(shards):
            self.close()
            raise next(iter(self._unreachable.values()))
        for shard in self._unreachable:
            if shard not in self._polling_unreachable:
                task = asyncio.create_task(self._poll_until_back(shard), name=f"manager: shard {shard}")
                self._polling_unreachable[shard] = task
        return {session_id for shard in shards for session_id in self._counters.get(shard, ())}

    def expired_leases(self) -> list[SessionId]:
        """The sessions whose counters stood still for a whole lease."""
        return self._watch.expired_sessions()

    def _present(self) -> list[int]:
        """The shards to ask now: those that answered last, or all if none did."""
        shards = range(self._queue.shards)
        return [shard for shard in shards if shard not in self._unreachable] or list(shards)

    async def _poll(self, shard: int) -> None:
        asked_at = self._clock()
        try:
            counters = await call_queue(self._timeout_ms, self._queue.maintenance.renewal_counters(shard))
        except InferqError as error:
            if shard not in self._unreachable and self._queue.shards > 1:
                then = "the sweeps go on with the others"
                log.warning("shard_unreachable", shard=shard, error=error.message, then=then)
            self._unreachable[shard] = error
            self._counters.pop(shard, None)
            self._watch.mark_unreachable(shard)
        else:
            if self._unreachable.pop(shard, None) is not None and self._queue.shards > 1:
                log.warning("shard_recovered", shard=shard)
            self._counters[shard] = counters
            self._watch.observe(shard, counters, asked_at, self._clock())

    async def _poll_until_back(self, shard: int) -> None:
        polls = 0
        while shard in self._unreachable:
            polls += 1
            await asyncio.sleep(_POLL_UNREACHABLE.pause_s(polls))
            try:
                await self._poll(shard)
            except Exception:
                # An answer that we cannot read is no reason to give the shard up.
                log.exception("shard_poll_failed", shard=shard)
        del self._polling_unreachable[shard]

    # Deadlines

    async def expire(self) -> Expired:
        """End the jobs whose deadlines passed, on every shard that answers. Raises the first error, after trying all of
        them."""
        swept, errors = Expired(), list[InferqError]()

        async def one(shard: int) -> None:
            nonlocal swept
            try:
                swept += await call_queue(self._timeout_ms, self._queue.maintenance.expire(shard))
            except InferqError as error:
                errors.append(error)

        await asyncio.gather(*(one(shard) for shard in self._present()))
        if errors:
            raise errors[0]
        return swept

    # Jobs of the dead

    def add_dead(self, session_id: SessionId, worker_id: str, cause: str) -> None:
        """A session is dead: :meth:`reclaim` takes its jobs back."""
        if session_id not in self._to_reclaim:
            log.warning("session_declared_dead", worker=worker_id, session_id=session_id, cause=cause)
            self._metrics.declared_dead(cause)
            self._to_reclaim[session_id] = _Dead(set(range(self._queue.shards)))

    def was_declared_dead(self, session_id: SessionId) -> bool:
        """Whether that session was declared dead not long ago: its jobs were taken back, or are being taken back."""
        return session_id in self._to_reclaim or session_id in self._reclaimed

    async def reclaim(self) -> None:
        """Take back the jobs of the dead, a few sessions at a time, on every reachable shard; on the others,
        once they answer again. Raises the first broker error, after trying all of them."""
        unreachable = self.unreachable
        due = [(session_id, dead) for session_id, dead in self._to_reclaim.items() if dead.shards - unreachable]
        errors = await asyncio.gather(
            *(self._reclaim_one(session_id, dead, unreachable) for session_id, dead in due[:RECLAIM_CONCURRENCY])
        )
        for error in errors:
            if error is not None:
                raise error

    async def _reclaim_one(self, session_id: SessionId, dead: _Dead, unreachable: set[int]) -> InferqError | None:
        failures: list[InferqError] = []

        async def on(shard: int) -> None:
            try:
                dead.reclaimed += await call_queue(self._timeout_ms, self._queue.maintenance.reclaim(session_id, shard))
            except InferqError as error:
                failures.append(error)
            else:
                dead.shards.discard(shard)

        await asyncio.gather(*(on(shard) for shard in sorted(dead.shards - unreachable)))
        if failures:
            return failures[0]
        if not dead.shards:
            self._to_reclaim.pop(session_id, None)
        self._reclaimed[session_id] = None
        while len(self._reclaimed) > MAX_RECLAIMED_REMEMBERED:
            del self._reclaimed[next(iter(self._reclaimed))]
        reclaimed, dead.reclaimed = dead.reclaimed, Reclaimed()
        self._metrics.reclaimed(reclaimed)
        log.info(
            "session_reclaimed",
            session_id=session_id,
            requeued=reclaimed.requeued,
            resumable=reclaimed.lost,
            dead=reclaimed.dead,
        )
        return None


@dataclass(slots=True)
class _Dead:
    """The shards where a dead session's jobs are still to be reclaimed, and what was reclaimed and not counted yet."""

    shards: set[int]
    reclaimed: Reclaimed = field(default_factory=Reclaimed)
