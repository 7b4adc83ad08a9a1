"""``Broker``: the queue's front for every role, one per process, composed of one part per kind of caller.

Concurrent calls of the same kind share round trips (:mod:`broker.operations.job_batches`). A call whose reply is lost
is repeated (:mod:`broker.redis.calls`) and has no second effect. All methods raise ``BrokerUnavailable`` when Redis
cannot be reached within the limit, ``BrokerUnsuitable`` when it refuses us.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from queue_schemas import InferqError, ShardKeys, shard_of_pool
from queue_schemas.keys import META

from .operations.attempts import Attempts
from .operations.dead_letters import DeadLetters
from .operations.durable_replies import DurableReplies
from .operations.fleet import Fleet
from .operations.job_batches import ShardBatches
from .operations.jobs import Jobs
from .operations.known_pools import KnownPools
from .operations.maintenance import Maintenance
from .operations.output import PersistedOutput
from .operations.persisted_jobs import PersistedJobs
from .operations.replies import Replies
from .operations.signed_leases import SignedLeases
from .operations.stats import QueueStats
from .operations.workers import Workers
from .redis.calls import Caller
from .redis.durable import DurableCaller
from .redis.health import ServerHealth, check_servers
from .redis.link import ClientLink, open_link
from .redis.server_checks import ServerFacts, check_deployment, read_facts
from .settings import MAX_REPLY_BYTES, BrokerSettings, Budgets, Durability

DURABLE_BATCHES = 8
"""Batches of one shard that may wait for the same fsync: 1024 jobs."""


class Broker:
    """The queue. Make one with :meth:`connect`, or :meth:`over` for a client at hand (fakeredis in tests).

    ``jobs``, ``replies``, ``output`` and ``persisted_jobs`` are for Routers, ``workers`` and ``attempts`` for workers
    and, with ``signed_leases``, for Routers that serve workers over HTTP, ``durable_replies`` for batches, ``fleet``,
    ``maintenance`` and ``stats`` for Managers, ``known_pools`` for Managers and Routers, ``dead_letters`` for
    operators.
    """

    def __init__(
        self,
        open_caller: Callable[[float], Caller],
        *,
        caller: Caller,
        shards: int,
        budgets: Budgets,
        max_reply_bytes: int,
        disk: bool = False,
        durable_callers: Sequence[DurableCaller] = (),
    ) -> None:
        self.shards = shards
        self._caller = caller
        self._durable_callers = durable_callers
        keys = [ShardKeys(shard) for shard in range(shards)]
        self._batches = [ShardBatches(caller, shard, budgets) for shard in keys]
        self._durable_batches = [
            [ShardBatches(durable, shard, budgets) for _ in range(DURABLE_BATCHES)]
            for durable, shard in zip(durable_callers, keys, strict=False)
        ]
        self._health = ServerHealth(caller, keys, disk=disk)
        control_read: dict[tuple[int, str], str] = {}
        self.replies = Replies(caller, keys)
        self.jobs = Jobs(caller, keys, self._batches, self._durable_batches, self.replies)
        self.output = PersistedOutput(caller, keys)
        self.persisted_jobs = PersistedJobs(caller, keys)
        self.durable_replies = DurableReplies(caller, keys)
        self.attempts = Attempts(caller, keys, self._batches, max_reply_bytes)
        self.maintenance = Maintenance(caller, keys, control_read)
        self.workers = Workers(caller, keys, self.maintenance, control_read, lambda: open_caller(0))
        self.signed_leases = SignedLeases(caller, keys)
        self.fleet = Fleet(caller, keys)
        self.known_pools = KnownPools(caller)
        self.stats = QueueStats(caller, keys)
        self.dead_letters = DeadLetters(caller, keys)

    @classmethod
    async def connect(
        cls, settings: BrokerSettings, *, budgets: Budgets | None = None, durability: Durability = "memory"
    ) -> Self:
        """Connect and check the server. Raises ``BrokerUnavailable`` at once if it cannot be reached: callers that can
        wait try again. With ``durability`` disk, background jobs are enqueued once they are on the server's disk."""

        def open_caller(retry_limit_s: float) -> Caller:
            return Caller(open_link(settings), retry_limit_s=retry_limit_s, script_flags=True)

        retry_limit_s = settings.retry_limit_ms / 1000
        caller = open_caller(retry_limit_s)
        keys = [ShardKeys(shard) for shard in range(settings.shards)]
        durable: list[DurableCaller] = []
        disk = durability == "disk"
        try:
            await caller.once(META, "PING")
            if await check_servers(caller, keys, disk=disk):
                fsync_limit_s = settings.command_timeout_ms / 1000
                durable = [
                    DurableCaller(caller.link, shard, retry_limit_s=retry_limit_s, fsync_limit_s=fsync_limit_s)
                    for shard in keys
                ]
            await check_deployment(caller, settings.shards)
        except InferqError:
            await caller.link.close()
            raise
        return cls(
            open_caller,
            caller=caller,
            shards=settings.shards,
            budgets=budgets or Budgets(),
            max_reply_bytes=settings.max_reply_bytes,
            disk=disk,
            durable_callers=durable,
        )

    @classmethod
    def over(
        cls, client: Any, *, shards: int = 1, budgets: Budgets | None = None, retry_limit_ms: int = 30_000
    ) -> Self:
        """A broker over a redis-py compatible client, unchecked and without script flags: for fakeredis."""

        def open_caller(retry_limit_s: float) -> Caller:
            return Caller(ClientLink(client), retry_limit_s=retry_limit_s, script_flags=False)

        return cls(
            open_caller,
            caller=open_caller(retry_limit_ms / 1000),
            shards=shards,
            budgets=budgets or Budgets(),
            max_reply_bytes=MAX_REPLY_BYTES,
        )

    async def close(self) -> None:
        """Close the connections; calls still under way are cancelled."""
        durable = [batches for shard in self._durable_batches for batches in shard]
        await asyncio.gather(*(batches.close() for batches in (*self._batches, *durable)))
        await asyncio.gather(*(caller.close() for caller in self._durable_callers))
        await self._caller.link.close()

    @property
    def round_trips(self) -> int:
        """Commands sent so far, without those of renewers with a connection of their own."""
        return self._caller.round_trips + sum(caller.round_trips for caller in self._durable_callers)

    @property
    def retries(self) -> int:
        """Calls that had to be sent again so far."""
        return self._caller.retries + sum(caller.retries for caller in self._durable_callers)

    def shard_of(self, pool: str) -> int:
        """The shard on which a pool's jobs live."""
        return shard_of_pool(pool, self.shards)

    async def ping(self) -> float:
        """Round trip in milliseconds, one try."""
        begin = time.perf_counter()
        await self._caller.once(META, "PING")
        return (time.perf_counter() - begin) * 1000

    async def server_faults(self) -> list[str]:
        """Why the queue's servers cannot be relied on now, in sentences without addresses; empty if they can. Bounded
        in time; changes are logged."""
        return await self._health.faults()

    async def facts(self) -> ServerFacts:
        """What the server says of itself."""
        return await read_facts(self._caller)
