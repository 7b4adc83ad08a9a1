"""The broker: every operation of the queue, for every role.

One object per process. Concurrent calls of the same kind share round trips (:mod:`broker.job_batches`); a call whose
reply is lost is repeated (:mod:`broker.redis.calls`) and has no second effect. All methods raise ``BrokerUnavailable``
when Redis cannot be reached within the limit, ``BrokerUnsuitable`` when it refuses us.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from queue_schemas import (
    BrokerUnavailable,
    Enqueued,
    Frame,
    InferqError,
    Job,
    JobId,
    Lane,
    Marker,
    PersistOptions,
    SessionId,
    ShardKeys,
    State,
    shard_of_job,
    shard_of_pool,
)
from queue_schemas.keys import META, keys_of_job
from telemetry import get_logger

from .audits import Audits
from .dead_letters import DeadLetters
from .durable_replies import DurableReplies
from .job_batches import KEEP_MS, ShardBatches
from .persisted_jobs import PersistedJobCalls
from .persisted_output import PersistedOutputCalls
from .redis.calls import Caller
from .redis.durable import DurableCaller
from .redis.fitness import Fitness, vet
from .redis.link import ClientLink, Link, open_link
from .redis.server_checks import ServerFacts, read_facts, settle_meta
from .redis.server_clock import ServerClocks
from .registry import RegistryCalls
from .renewal import Renewer
from .reply_streams import ReplyReader
from .settings import BrokerSettings, Budgets, Durability
from .stats import QueueStats
from .upkeep import UpkeepCalls
from .worker_calls import WorkerCalls

REPLIES_PATIENCE_S = 5.0
"""How long a Router that starts waits for the shards that do not answer."""
DURABLE_LINES = 8
"""Batches of one shard that may wait for the same fsync: 1024 jobs."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands. ``attempt_id`` is empty unless it runs."""

    state: State
    epoch: int
    attempt_id: str


def _is_awaited(job: Job) -> bool:
    """Whether somebody waits for its answer now, who would see to it that it is queued again."""
    return job.lane is Lane.INTERACTIVE and not (job.stored and job.idempotency_key)


class Broker(
    PersistedJobCalls, WorkerCalls, UpkeepCalls, PersistedOutputCalls, DurableReplies, RegistryCalls, QueueStats
):
    """The queue. Make one with :meth:`connect`, or :meth:`over` for a client at hand (fakeredis in tests)."""

    def __init__(
        self,
        open_link: Callable[[], Link],
        *,
        shards: int,
        budgets: Budgets,
        retry_limit_ms: int,
        script_flags: bool,
    ) -> None:
        self.shards = shards
        self.replies_ready = asyncio.Event()
        """Set once this Router's reply streams exist; only then may it enqueue."""
        self._unheard: set[int] = set()
        """Shards on which this Router's reply stream does not exist yet."""
        self._open_link = open_link
        self._script_flags = script_flags
        self._caller = Caller(open_link(), retry_limit_s=retry_limit_ms / 1000, script_flags=script_flags)
        self._keys = [ShardKeys(shard) for shard in range(shards)]
        self._batches = [ShardBatches(self._caller, keys, budgets) for keys in self._keys]
        self.dead_letters = DeadLetters(self._caller, self._keys)
        self._control_read: dict[tuple[int, str], str] = {}
        self._dropped: dict[int, int] = {}
        self._unjoined: dict[str, set[int]] = {}
        self._renewer = Renewer(self._caller, self._keys, self._control_read, self._unjoined)
        self._budgets = budgets
        self._retry_limit_s = retry_limit_ms / 1000
        self._durable_callers: list[DurableCaller] = []
        self._durable: list[list[ShardBatches]] = []
        self._turns = itertools.count()
        self._clock = ServerClocks()
        self._audits = Audits(self._caller)
        self._fitness = Fitness(self._caller, self._keys, disk=False)

    @classmethod
    async def connect(
        cls, settings: BrokerSettings, *, budgets: Budgets | None = None, durability: Durability = "memory"
    ) -> Self:
        """Connect and check the server. Raises ``BrokerUnavailable`` at once if it cannot be reached: callers that can
        wait try again. With ``durability`` disk, jobs that nobody waits for are enqueued once they are on the disk."""
        broker = cls(
            lambda: open_link(settings),
            shards=settings.shards,
            budgets=budgets or Budgets(),
            retry_limit_ms=settings.retry_limit_ms,
            script_flags=True,
        )
        try:
            await broker._caller.once(META, "PING")
            disk = durability == "disk"
            if await vet(broker._caller, broker._keys, disk=disk):
                broker._wait_for_disk(settings)
            broker._fitness = Fitness(broker._caller, broker._keys, disk=disk)
            await settle_meta(broker._caller, settings.shards)
        except InferqError:
            await broker.close()
            raise
        return broker

    @classmethod
    def over(
        cls, client: Any, *, shards: int = 1, budgets: Budgets | None = None, retry_limit_ms: int = 30_000
    ) -> Self:
        """A broker over a redis-py compatible client, unchecked and without script flags: for fakeredis."""
        return cls(
            lambda: ClientLink(client),
            shards=shards,
            budgets=budgets or Budgets(),
            retry_limit_ms=retry_limit_ms,
            script_flags=False,
        )

    def _wait_for_disk(self, settings: BrokerSettings) -> None:
        """From now on what nobody waits for is taken in once it is on the disk."""
        for keys in self._keys:
            caller = DurableCaller(
                self._caller.link,
                keys,
                retry_limit_s=self._retry_limit_s,
                fsync_limit_s=settings.command_timeout_ms / 1000,
            )
            self._durable_callers.append(caller)
            self._durable.append([ShardBatches(caller, keys, self._budgets) for _ in range(DURABLE_LINES)])

    async def close(self) -> None:
        """Close the connections; calls still under way are cancelled."""
        durable = [batches for lines in self._durable for batches in lines]
        await asyncio.gather(*(batches.close() for batches in (*self._batches, *durable)))
        await asyncio.gather(*(caller.close() for caller in self._durable_callers))
        await self._caller.link.close()

    @property
    def round_trips(self) -> int:
        """Commands sent so far, without those of renewers apart."""
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
        """Why the queue's servers cannot be relied on now, in sentences for anybody; empty: they can. Bounded in time;
        what changes is logged."""
        return await self._fitness.faults()

    async def facts(self) -> ServerFacts:
        """What the server says of itself."""
        return await read_facts(self._caller)

    # Routers

    async def enqueue(self, job: Job) -> State:
        """Put ``job`` on its queue: ``QUEUED``, or the state of a job of that id that is already known (``CANCELLED``
        for one that was cancelled before it came). Raises ``OverCapacity``, ``BrokerFull``, and ``NotOnDisk`` for one
        that nobody waits for, where that is to be on the disk first (:meth:`connect`)."""
        return (await self._line(job).enqueue(job)).state

    async def enqueue_persisted_request(self, job: Job, listener: SessionId, keep_ms: int = KEEP_MS) -> Enqueued:
        """Put a stored ``job`` on its queue, or find the one that holds its idempotency key. ``listener`` is the Router
        that is sent its output; of another job it has to :meth:`attach` to be. The answer is kept for ``keep_ms`` once
        it is whole. Raises like :meth:`enqueue`, and ``IdempotencyKeyReused`` if the key belongs to another request."""
        return await self._line(job).enqueue(job, listener, PersistOptions(keep_ms))

    def _line(self, job: Job) -> ShardBatches:
        """The calls with which a job is enqueued. Raises ``BrokerUnavailable`` where its answer could not be heard."""
        shard = shard_of_job(job.id)
        if shard in self._unheard:
            raise BrokerUnavailable(
                "the part of the queue's Redis that holds this model has not been reached yet; try again shortly",
                retry_after_s=2,
            )
        if self._durable and not _is_awaited(job):
            return self._durable[shard][next(self._turns) % DURABLE_LINES]
        return self._batches[shard]

    async def resume(self, job: Job, epoch: int) -> State | None:
        """Put a stream that is lost under ``epoch`` back on its queue, with ``job`` as its envelope: what the next
        attempt needs to go on. Answers ``QUEUED``, also when repeated, or the state if it is another one (``LOST``:
        under a later epoch); None for a job that is unknown."""
        keys = keys_of_job(self._keys, job.id)
        found = await self._caller.script("resume", keys.budget, keys.prefix, job.id, epoch, job.pack())
        return None if found == b"unknown" else State(found.decode())

    async def raise_epoch(self, job_id: JobId, heard: int) -> Standing | None:
        """Where a job stands after Redis may have lost its latest writes; None if it is unknown.

        If it waits, its epoch is raised above ``heard``, the highest that was heard of it (0: none), and above all that
        may have been given out since: an attempt that the lost writes began is told from those to come.
        """
        keys = keys_of_job(self._keys, job_id)
        state, epoch, attempt_id = await self._caller.script("raise_epoch", keys.budget, keys.prefix, job_id, heard)
        return None if state == b"unknown" else Standing(State(state.decode()), int(epoch), attempt_id.decode())

    async def cancel(self, job_id: JobId, reason: str, *, if_orphaned: bool = False) -> State | None:
        """Cancel a job; the state it was in, None if it is unknown (a late enqueue of it is void then).
        ``if_orphaned``:
        nobody waits for it here, so it is left alone if it is stored, or unknown."""
        keys = keys_of_job(self._keys, job_id)
        found = await self._caller.script("cancel", keys.budget, keys.prefix, job_id, reason, int(if_orphaned), 0)
        return None if found == b"unknown" else State(found.decode())

    async def read_replies(
        self,
        router: SessionId,
        deliver: Callable[[list[Frame | Marker]], None],
        lost: Callable[[int], None] | None = None,
    ) -> NoReturn:
        """Read this Router's reply streams until cancelled; ``deliver`` gets what comes, in order per job.

        ``lost(shard)`` is called when the stream of a shard had vanished and was made again, or the server is another
        run of itself: answers to jobs of that shard, or jobs, may be missing. Malformed entries are logged and passed
        over.
        """

        def opened(shard: int) -> Callable[[bool], None]:
            def tell(first: bool) -> None:
                if first:
                    self._unheard.discard(shard)
                    if not self._unheard:
                        self.replies_ready.set()
                elif lost is not None:
                    lost(shard)

            return tell

        async def go_on_without() -> None:
            """A shard that is away keeps no Router from serving the others."""
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.replies_ready.wait(), REPLIES_PATIENCE_S)
                    return
                if len(self._unheard) == self.shards:
                    continue
                log.warning("reply_streams_missing", shards=sorted(self._unheard), then="the other shards are served")
                self.replies_ready.set()
                return

        self._unheard = set(range(self.shards))
        async with asyncio.TaskGroup() as group:
            group.create_task(go_on_without())
            for keys in self._keys:
                group.create_task(ReplyReader(self._caller, keys, router, deliver, opened(keys.shard)).run())
        raise AssertionError("reply readers run until cancelled")
