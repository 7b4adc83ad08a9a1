"""What a sweep does shard by shard: renewal numbers, deadlines. A shard that is away stops no other."""

from __future__ import annotations

import asyncio

from broker import Expired
from queue_schemas import InferqError, SessionId, ShardedLeaseWatch
from telemetry import get_logger
from telemetry.backoff import Backoff

from .failure_detector import Clock, within
from .ports import QueuePort
from .settings import ManagerSettings

_BACKOFF = Backoff(1.0, 8.0)

log = get_logger(__name__)


class ShardSweeps:
    """Polls and sweeps the shards of one term. One that does not answer is left out of the sweeps, and asked beside
    them, with pauses that grow, until it does: however long it takes to say nothing, the others do not wait."""

    def __init__(self, settings: ManagerSettings, queue: QueuePort, clock: Clock) -> None:
        self._limit_ms = settings.broker_call_ms
        self._queue = queue
        self._clock = clock
        self._watch = ShardedLeaseWatch(settings.lease_ms / 1000, queue.shards)
        self._numbers: dict[int, dict[SessionId, int]] = {}
        self._away: dict[int, InferqError] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}

    def __contains__(self, session_id: SessionId) -> bool:
        """Whether the session id had a renewal number when it was looked for last."""
        return session_id in self._watch

    @property
    def away(self) -> set[int]:
        """The shards that do not answer now."""
        return set(self._away)

    async def look(self) -> set[SessionId]:
        """Poll the renewal numbers: the sessions that have one. Raises if no shard answers."""
        shards = range(self._queue.shards)
        await asyncio.gather(*(self._poll(shard) for shard in self._present()))
        if len(self._away) == len(shards):
            self.close()
            raise next(iter(self._away.values()))
        for shard in self._away:
            if shard not in self._asking:
                self._asking[shard] = asyncio.create_task(self._until_back(shard), name=f"manager: shard {shard}")
        return {session_id for shard in shards for session_id in self._numbers.get(shard, ())}

    def still(self) -> list[SessionId]:
        """The sessions whose leases are lost."""
        return self._watch.still()

    async def expire(self) -> Expired:
        """Sweep every shard that answers. Raises the first error, after trying all of them."""
        swept, errors = Expired(), list[InferqError]()

        async def one(shard: int) -> None:
            nonlocal swept
            try:
                swept += await within(self._limit_ms, self._queue.maintenance.expire(shard))
            except InferqError as error:
                errors.append(error)

        await asyncio.gather(*(one(shard) for shard in self._present()))
        if errors:
            raise errors[0]
        return swept

    def close(self) -> None:
        """Ask nobody any more."""
        for task in self._asking.values():
            task.cancel()
        self._asking.clear()

    def _present(self) -> list[int]:
        """The shards to be asked now: those that answered last, or all if none did."""
        shards = range(self._queue.shards)
        return [shard for shard in shards if shard not in self._away] or list(shards)

    async def _poll(self, shard: int) -> None:
        asked_at = self._clock()
        try:
            numbers = await within(self._limit_ms, self._queue.maintenance.renewal_counters(shard))
        except InferqError as error:
            if shard not in self._away and self._queue.shards > 1:
                log.warning("shard_away", shard=shard, error=error.message, then="the others are looked after")
            self._away[shard] = error
            self._numbers.pop(shard, None)
            self._watch.away(shard)
        else:
            if self._away.pop(shard, None) is not None and self._queue.shards > 1:
                log.warning("shard_back", shard=shard)
            self._numbers[shard] = numbers
            self._watch.observe(shard, numbers, asked_at, self._clock())

    async def _until_back(self, shard: int) -> None:
        tries = 0
        while shard in self._away:
            tries += 1
            await asyncio.sleep(_BACKOFF.pause_s(tries))
            await self._poll(shard)
        del self._asking[shard]
