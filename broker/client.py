"""The broker: every operation of the queue, for every role.

One object per process. Concurrent calls of the same kind share round trips (:mod:`broker.job_batches`); a call whose
reply is lost is repeated (:mod:`broker.calls`) and has no second effect. All methods raise ``BrokerUnavailable`` when
Redis cannot be reached within the limit, ``BrokerUnsuitable`` when it refuses us.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from pydantic import ValidationError

from queue_schemas import (
    BadMessage,
    BadRequest,
    Claimed,
    Control,
    ControlKind,
    Enqueued,
    Fenced,
    Frame,
    Incarnation,
    InferqError,
    Job,
    JobId,
    Lane,
    LaneDepth,
    Lease,
    Marker,
    Outcome,
    Output,
    Pool,
    Settled,
    ShardKeys,
    State,
    WorkerInfo,
    shard_of_job,
    shard_of_pool,
    unpack_frames,
)
from queue_schemas.ids import check_incarnation, check_name, check_worker_id, decode_name, encode_name
from queue_schemas.keys import MANAGER, META, POOLS, WORKERS
from telemetry import get_logger

from .calls import Caller, pairs
from .dead_letters import DeadLetters
from .durable import DurableCaller, waits_for_disk
from .job_batches import KEEP_MS, ShardBatches, attempt_of
from .link import ClientLink, Link, open_link
from .renewal import Renewer
from .server import ServerFacts, read_facts, require_suitable, settle_meta
from .settings import BrokerSettings, Budgets, Durability
from .streams import ReplyReader, read_control

PARK_MS = 30_000
"""How long a parked worker counts as idle without claiming again."""
POOL_MEMORY_MS = 24 * 3600 * 1000
"""How long a pool that nobody declared is remembered after its last worker."""
DURABLE_LINES = 8
"""Batches of one shard that may wait for the same fsync: 1024 jobs."""
_RECLAIM_STEP = 256
_EXPIRE_STEP = 256
_EXPIRE_STEPS = 32
"""Most calls of one sweep on a shard, made while each meets its limit: a burst is worked off, 8192 jobs a second."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What became of the jobs of one incarnation. ``lost``: streams that wait for their Routers."""

    requeued: int = 0
    dead: int = 0
    cancelled: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands. ``attempt_id`` is empty unless it runs."""

    state: State
    epoch: int
    attempt_id: str


@dataclass(frozen=True, slots=True)
class Expired:
    """What one sweep did: jobs ended because their time ran out, workers woken, kept answers forgotten."""

    expired: int = 0
    woken: int = 0
    forgotten: int = 0


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Counts since ever, by ``(pool, lane, event)``.

    ``events``: ``enqueued``, ``requeued``, ``lost`` and the terminal states. ``stopped``: those cancelled or expired
    once more, with what they were doing: ``cancelled/waiting``, ``cancelled/running``, ``cancelled/router_gone`` (the
    queue found that nobody waits for the answer), ``expired/waiting`` (never started again), ``expired/running``.
    """

    events: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)
    stopped: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)


class Broker:
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
        self._open_link = open_link
        self._script_flags = script_flags
        self._caller = Caller(open_link(), retry_limit_s=retry_limit_ms / 1000, script_flags=script_flags)
        self._keys = [ShardKeys(shard) for shard in range(shards)]
        self._batches = [ShardBatches(self._caller, keys, budgets) for keys in self._keys]
        self.dead_letters = DeadLetters(self._caller, self._keys)
        self._control_read: dict[tuple[int, str], str] = {}
        self._renewer = Renewer(self._caller, self._keys, self._control_read)
        self._budgets = budgets
        self._retry_limit_s = retry_limit_ms / 1000
        self._durable_callers: list[DurableCaller] = []
        self._durable: list[list[ShardBatches]] = []
        self._turns = itertools.count()

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
            facts = await read_facts(broker._caller)
            require_suitable(facts)
            if durability == "disk" and waits_for_disk(facts):
                broker._wait_for_disk(settings)
            await settle_meta(broker._caller, settings.shards)
        except InferqError:
            await broker.close()
            raise
        for concern in facts.concerns:
            log.warning("broker_concern", concern=concern)
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

    async def facts(self) -> ServerFacts:
        """What the server says of itself."""
        return await read_facts(self._caller)

    # Routers

    async def enqueue(self, job: Job) -> State:
        """Put ``job`` on its queue: ``QUEUED``, or the state of a job of that id that is already known (``CANCELLED``
        for one that was cancelled before it came). Raises ``OverCapacity``, ``BrokerFull``, and ``NotOnDisk`` for one
        that nobody waits for, where that is to be on the disk first (:meth:`connect`)."""
        return (await self._line(job).enqueue(job)).state

    async def enqueue_stored(self, job: Job, listener: Incarnation, keep_ms: int = KEEP_MS) -> Enqueued:
        """Put a stored ``job`` on its queue, or find the one that holds its idempotency key. ``listener`` is the Router
        that is sent its output; of another job it has to :meth:`attach` to be. The answer is kept for ``keep_ms`` once
        it is whole. Raises like :meth:`enqueue`, and ``IdempotencyKeyReused`` if the key belongs to another request."""
        return await self._line(job).enqueue(job, listener, keep_ms)

    def _line(self, job: Job) -> ShardBatches:
        """The calls with which a job is enqueued."""
        shard = shard_of_job(job.id)
        if self._durable and (job.stored or job.lane is not Lane.INTERACTIVE):
            return self._durable[shard][next(self._turns) % DURABLE_LINES]
        return self._batches[shard]

    async def attach(self, job_id: JobId, listener: Incarnation, after: tuple[int, int] = (0, 0)) -> Output | None:
        """A page of what is kept of a stored job, from frame ``(epoch, seq)`` on, the Router ``listener`` being sent
        what is added from now on. None if the job is unknown. Who goes on reading asks from the last frame it has: if
        the page does not begin with it, the server lost that frame, and what comes next need not be behind it."""
        return await self._read_output(job_id, listener, after)

    async def detach(self, job_id: JobId, listener: Incarnation) -> None:
        """``listener`` is not sent a stored job's output any more. One try."""
        key = self._keys[shard_of_job(job_id)].listeners(job_id)
        await self._caller.once(key, "SREM", key, listener)

    async def resume(self, job: Job, epoch: int) -> State | None:
        """Put a stream that is lost under ``epoch`` back on its queue, with ``job`` as its envelope: what the next
        attempt needs to go on. Answers ``QUEUED``, also when repeated, or the state if it is another one (``LOST``:
        under a later epoch); None for a job that is unknown."""
        keys = self._keys[shard_of_job(job.id)]
        found = await self._caller.script("resume", keys.budget, keys.prefix, job.id, epoch, job.pack())
        return None if found == b"unknown" else State(found.decode())

    async def raise_epoch(self, job_id: JobId, heard: int) -> Standing | None:
        """Where a job stands after Redis may have lost its latest writes; None if it is unknown.

        If it waits, its epoch is raised above ``heard``, the highest that was heard of it (0: none), and above all that
        may have been given out since: an attempt that the lost writes began is told from those to come.
        """
        keys = self._keys[shard_of_job(job_id)]
        state, epoch, attempt_id = await self._caller.script("raise_epoch", keys.budget, keys.prefix, job_id, heard)
        return None if state == b"unknown" else Standing(State(state.decode()), int(epoch), attempt_id.decode())

    async def cancel(self, job_id: JobId, reason: str, *, unasked: bool = False) -> State | None:
        """Cancel a job; the state it was in, None if it is unknown (a late enqueue of it is void then). ``unasked``:
        nobody waits for it here, so it is left alone if it is stored, or unknown."""
        keys = self._keys[shard_of_job(job_id)]
        found = await self._caller.script("cancel", keys.budget, keys.prefix, job_id, reason, int(unasked))
        return None if found == b"unknown" else State(found.decode())

    async def read_replies(
        self,
        router: Incarnation,
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
                    made.add(shard)
                    if len(made) == self.shards:
                        self.replies_ready.set()
                elif lost is not None:
                    lost(shard)

            return tell

        made: set[int] = set()
        async with asyncio.TaskGroup() as group:
            for keys in self._keys:
                group.create_task(ReplyReader(self._caller, keys, router, deliver, opened(keys.shard)).run())
        raise AssertionError("reply readers run until cancelled")

    # Workers

    async def join(self, incarnation: Incarnation) -> None:
        """Enter the fabric: from now on ``incarnation`` may claim, on every shard."""
        for keys in self._keys:
            await self._caller.script("join", keys.budget, keys.prefix, incarnation)

    async def leave(self, incarnation: Incarnation) -> Reclaimed:
        """Leave the fabric; what is still held is handed back as if never started."""
        return await self._take_back(incarnation, counted=False, reason="its worker left")

    async def claim(
        self,
        shard: int,
        incarnation: Incarnation,
        seq: int,
        turn: int,
        n: int,
        pools: Sequence[tuple[Pool, Sequence[Lane]]],
        region: str = "",
    ) -> Claimed:
        """Up to ``n`` jobs of ``pools`` on ``shard``; with fewer than ``n`` the worker is parked until it is woken, or
        until ``look_again_ms`` of the answer have passed.

        ``seq`` rises with every new claim: the same one again answers the same leases. ``turn`` is how many jobs the
        worker has claimed so far on the shard; it decides which lane goes first. ``region`` is the worker's: it claims
        that region's jobs and those of none first, others once they have waited their patience. Raises ``Fenced`` if
        the incarnation was declared dead.
        """
        keys = self._keys[shard]
        wanted: list[str] = []
        for pool, lanes in pools:
            wanted += (encode_name(pool), ",".join(lanes))
        reply = await self._caller.script(
            "claim", keys.budget, keys.prefix, incarnation, seq, turn, n, secrets.token_hex(6), PARK_MS,
            encode_name(region), *wanted,
        )  # fmt: skip
        if reply[0] == b"fenced":
            raise Fenced(f"{incarnation} was declared dead: join again as a new incarnation")
        leases = []
        for job_id, envelope, epoch, attempt_id, attempt, remaining_ms, waited_ms, suspect in reply[2:]:
            try:
                job = Job.unpack(envelope)
            except BadRequest as error:
                await self._refuse(keys, incarnation, (job_id, epoch, attempt_id), error)
            else:
                leases.append(
                    Lease(job, epoch, attempt_id.decode(), attempt, remaining_ms, waited_ms, suspect=bool(suspect))
                )
        return Claimed(tuple(leases), reply[1] if reply[1] >= 0 else None)

    async def _refuse(
        self, keys: ShardKeys, incarnation: str, attempt: tuple[bytes, int, bytes], error: BadRequest
    ) -> None:
        """An envelope that this build cannot read is left to others, and ends as a dead letter if none can."""
        log.warning("envelope_refused", job_id=attempt[0].decode(), error=error.message)
        reason = f"its worker cannot read it: {error.message}"
        await self._caller.script("release", keys.budget, keys.prefix, *attempt, 1, reason)
        # The claim may have given all that was asked for, and so not parked this worker: it has to claim again.
        control = keys.control(incarnation)
        await self._caller.command(control, "XADD", control, "NOMKSTREAM", "*", "k", ControlKind.WAKE.value)

    async def renew(self, incarnation: Incarnation) -> None:
        """Keep all leases of ``incarnation``. Raises ``Fenced`` if it was declared dead."""
        await self._renewer.renew(incarnation)

    def renewer_apart(self) -> Renewer:
        """A renewer with a connection of its own, to be used and closed in one event loop, which may be another."""
        caller = Caller(self._open_link(), retry_limit_s=0, script_flags=self._script_flags)
        return Renewer(caller, self._keys, self._control_read)

    async def hold(self, shard: int, incarnation: Incarnation, seq: int, leases: Sequence[Lease]) -> set[str]:
        """Make ``leases``, all that ``incarnation`` runs on ``shard``, and what Redis says of it the same: after a
        restart or a failover it may have lost its latest writes.

        Answers the ids of the attempts that are not this worker's: nobody will take their answers. What it held without
        running it waits again, uncounted. ``seq`` is that of its last claim. Raises ``Fenced`` if the incarnation was
        declared dead.
        """
        keys = self._keys[shard]
        last_read = self._control_read.get((shard, incarnation), "0")
        attempts = [part for lease in leases for part in attempt_of(lease)]
        reply = await self._caller.script("hold", keys.budget, keys.prefix, incarnation, seq, last_read, *attempts)
        if reply[0] == b"fenced":
            raise Fenced(f"{incarnation} was declared dead: join again as a new incarnation")
        return {attempt_id.decode() for attempt_id in reply[1:]}

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> set[str]:
        """Send packed frames to Routers (``reply_to`` -> bytes) and answer those that are gone.

        One try: on ``BrokerUnavailable`` the frames may or may not have arrived; sending them again is harmless,
        because a Router drops repeats by ``seq``.
        """
        keys = self._keys[shard]

        async def send(reply_to: str, packed: bytes) -> bool:
            key = keys.reply(reply_to)
            return await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", "f", packed) is None

        gone = await asyncio.gather(*(send(reply_to, packed) for reply_to, packed in frames.items()))
        return {reply_to for reply_to, is_gone in zip(frames, gone, strict=True) if is_gone}

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        """Add packed frames of an attempt to its stored job's output, and send them to those who listen. ``OK`` also
        for frames that are there already. One try: on ``BrokerUnavailable`` they may or may not be there; sending them
        again is harmless."""
        return await self._batches[shard_of_job(lease.job.id)].append(lease, frames)

    async def read_output(self, job_id: JobId, after: tuple[int, int] = (0, 0)) -> Output | None:
        """A page of what is kept of a stored job, from frame ``(epoch, seq)`` on; None if the job is unknown."""
        return await self._read_output(job_id, "", after)

    async def _read_output(self, job_id: JobId, listener: str, after: tuple[int, int]) -> Output | None:
        keys = self._keys[shard_of_job(job_id)]
        first = "{}-{}".format(*after) if after > (0, 0) else "-"
        reply = await self._caller.script("attach", keys.budget, keys.prefix, job_id, listener, first)
        if not reply:
            return None
        state, epoch, attempt_id, end, complete, *frames = reply
        end_epoch, _, end_seq = end.decode().partition("-")
        return Output(
            State(state.decode()),
            epoch,
            attempt_id.decode(),
            (int(end_epoch or 0), int(end_seq or 0)),
            tuple(frame for packed in frames for frame in unpack_frames(packed)),
            bool(complete),
        )

    async def settle(self, lease: Lease, outcome: Outcome, frames: bytes = b"") -> Settled:
        """End an attempt with its answer. ``frames`` (packed; those not yet published, the last with END) reach the
        Router, or those who listen to a stored job, only if the answer is ``OK``."""
        return await self._batches[shard_of_job(lease.job.id)].settle(lease, outcome, frames)

    async def release(self, lease: Lease, reason: str, *, counted: bool) -> Settled:
        """End an attempt without an answer: the job waits again, ahead of new work.

        ``counted``: the attempt is spent, this worker is avoided for two seconds, and a job whose attempts are used up
        becomes a dead letter. Otherwise it is handed back as if never started.
        """
        return await self._batches[shard_of_job(lease.job.id)].release(lease, reason, counted)

    async def crashed(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        """End all attempts that ran on an engine that crashed, in one call per shard.

        Which job did it cannot be known: if there are suspects among them, each of those is charged an attempt, else
        every job. All are suspects from now on: a worker is given one of them at a time.
        """
        answers: dict[str, Settled] = {}
        for keys in self._keys:
            here = [lease for lease in leases if shard_of_job(lease.job.id) == keys.shard]
            if here:
                attempts = [part for lease in here for part in attempt_of(lease)]
                found = await self._caller.script("crashed", keys.budget, keys.prefix, reason, *attempts)
                for lease, answer in zip(here, found, strict=True):
                    answers[lease.attempt_id] = Settled(answer.decode())
        return [answers[lease.attempt_id] for lease in leases]

    async def clear(self, lease: Lease) -> Settled:
        """Clear a running job of suspicion: it has put out more than before its engine crashed."""
        keys = self._keys[shard_of_job(lease.job.id)]
        return Settled((await self._caller.script("clear", keys.budget, keys.prefix, *attempt_of(lease))).decode())

    async def read_control(
        self, shard: int, incarnation: Incarnation, after: str, block_ms: int
    ) -> list[tuple[str, Control | None]]:
        """Control messages behind ``after`` ("0" at first) with their ids, waiting up to ``block_ms`` for one."""
        messages = await read_control(self._caller, self._keys[shard], incarnation, after, block_ms)
        self._control_read[(shard, incarnation)] = after
        return messages

    # Managers

    async def beats(self) -> dict[Incarnation, int]:
        """Renewal numbers by incarnation, summed over the shards. One try."""
        numbers: dict[Incarnation, int] = {}
        for keys in self._keys:
            for name, number in pairs(await self._caller.once(keys.beats, "HGETALL", keys.beats)):
                try:
                    incarnation = check_incarnation(name.decode("utf-8", "replace"))
                    int(number)
                except (BadMessage, ValueError) as error:
                    log.debug("beat_unreadable", error=str(error))  # at each sweep: nobody of ours wrote it
                    continue
                numbers[incarnation] = numbers.get(incarnation, 0) + int(number)
        return numbers

    async def send_control(self, incarnation: Incarnation, control: Control) -> bool:
        """Put a message on a worker's control stream (of shard 0); False if the worker is gone."""
        key = self._keys[0].control(incarnation)
        fields = [part for pair in control.fields().items() for part in pair]
        return await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", *fields) is not None

    async def reclaim(self, incarnation: Incarnation) -> Reclaimed:
        """Declare an incarnation dead: it is fenced, and its jobs wait again or end."""
        return await self._take_back(incarnation, counted=True, reason="its worker was lost")

    async def _take_back(self, incarnation: Incarnation, *, counted: bool, reason: str) -> Reclaimed:
        requeued = dead = cancelled = lost = 0
        for keys in self._keys:
            left = 1
            while left:
                reply = await self._caller.script(
                    "reclaim", keys.budget, keys.prefix, incarnation, int(counted), _RECLAIM_STEP, reason
                )
                requeued, dead, cancelled = requeued + reply[0], dead + reply[1], cancelled + reply[2]
                left, lost = reply[3], lost + reply[4]
        for keys in self._keys:
            self._control_read.pop((keys.shard, incarnation), None)
        return Reclaimed(requeued, dead, cancelled, lost)

    async def expire(self) -> Expired:
        """The sweep of each second, on every shard."""
        expired = woken = forgotten = 0
        for keys in self._keys:
            for _ in range(_EXPIRE_STEPS):
                reply = await self._caller.script("expire", keys.budget, keys.prefix, _EXPIRE_STEP)
                expired, woken, forgotten = expired + reply[0], woken + reply[1], forgotten + reply[2]
                if max(reply[0], reply[2]) < _EXPIRE_STEP:
                    break
        return Expired(expired, woken, forgotten)

    async def act_as_manager(self, manager_id: str, ttl_ms: int, above: int = 0) -> int | None:
        """Take or keep the acting Manager's lease for ``ttl_ms``: its term, higher than ``above``, or None while
        another holds it."""
        return int(await self._caller.script("act_as_manager", MANAGER, manager_id, ttl_ms, above)) or None

    async def resign_manager(self, manager_id: str) -> None:
        """Give up the acting Manager's lease, if held."""
        await self._caller.script("act_as_manager", MANAGER, manager_id, 0, 0)

    async def manager_beat(self) -> int:
        """A number that rises while a Manager acts: until when its lease lasts (server ms, not to be compared with a
        clock); 0 if there is none, or what nobody of ours wrote. One try."""
        until: bytes = await self._caller.once(MANAGER, "HGET", MANAGER, "until") or b""
        return int(until) if until.isdigit() else 0

    async def load_workers(self) -> dict[str, WorkerInfo]:
        """The registry as the acting Manager last wrote it; entries that cannot be read are left out."""
        workers: dict[str, WorkerInfo] = {}
        for name, info in pairs(await self._caller.once(WORKERS, "HGETALL", WORKERS)):
            worker_id = name.decode("utf-8", "backslashreplace")
            try:
                workers[check_worker_id(worker_id)] = WorkerInfo.model_validate_json(info)
            except BadMessage as error:
                log.warning("registry_entry_unreadable", error=error.message)
            except ValidationError as error:
                # Of a version that we cannot read: the worker's next heartbeat tells the Manager all that is in it.
                faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3]]
                log.warning("registry_entry_unreadable", worker_id=worker_id, error="; ".join(faults)[:300])
        return workers

    async def save_workers(self, changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None:
        """Write what changed in the registry."""
        fields: list[str | bytes] = []
        for info in changed:
            fields += (info.worker_id, info.model_dump_json())
        if fields:
            await self._caller.command(WORKERS, "HSET", WORKERS, *fields)
        if gone := list(gone):
            await self._caller.command(WORKERS, "HDEL", WORKERS, *gone)

    async def remember_pools(self, models: Iterable[str], *, declared: bool = False) -> None:
        """Keep pools known for a day from now. Whoever declares pools does so again from time to time."""
        now = await self._server_ms()
        kind = "declared" if declared else "seen"
        fields: list[str | int] = []
        for model in models:
            fields += (f"{kind}:{model}", now)
        if fields:
            await self._caller.command(POOLS, "HSET", POOLS, *fields)

    async def known_pools(self) -> dict[Pool, bool]:
        """Pools declared (True) or served (False) within a day; older ones are forgotten."""
        now = await self._server_ms()
        known: dict[Pool, bool] = {}
        for name, when in pairs(await self._caller.once(POOLS, "HGETALL", POOLS)):
            kind, _, model = name.decode("utf-8", "backslashreplace").partition(":")
            # What is no entry of ours is forgotten like an old one.
            is_ours = kind in ("declared", "seen") and when.isdigit() and _is_name(model)
            if is_ours and now - int(when[:18]) < POOL_MEMORY_MS:
                known[Pool(model)] = known.get(Pool(model), False) or kind == "declared"
            else:
                await self._caller.once(POOLS, "HDEL", POOLS, name)
        return known

    async def _server_ms(self) -> int:
        seconds, micros = await self._caller.once(META, "TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    # Figures

    async def depths(self) -> dict[Pool, dict[Lane, LaneDepth]]:
        """How much waits and runs, per pool and lane; places with neither are left out."""
        depths: dict[Pool, dict[Lane, LaneDepth]] = {}
        for keys in self._keys:
            for where, waiting, leased, oldest in await self._caller.script("depth", keys.budget, keys.prefix):
                pool, lane, region = _place(where.decode())
                lanes = depths.setdefault(pool, {})
                so_far = lanes.get(lane, LaneDepth())
                by_region = so_far.by_region | ({region: waiting} if region and waiting else {})
                lanes[lane] = LaneDepth(
                    waiting=so_far.waiting + waiting,
                    leased=so_far.leased + leased,
                    oldest_age_ms=max(so_far.oldest_age_ms, oldest),
                    by_region=by_region,
                )
        return depths

    async def totals(self) -> dict[tuple[Pool, Lane, str], int]:
        """What happened to jobs since ever: ``JobCounts.events``."""
        return (await self.job_counts()).events

    async def job_counts(self) -> JobCounts:
        """What happened to jobs since ever, and why they were stopped."""
        counts = JobCounts()
        for keys in self._keys:
            for name, count in pairs(await self._caller.once(keys.totals, "HGETALL", keys.totals)):
                place, _, event = name.decode().rpartition(":")
                pool, lane, _ = _place(place)
                kind = counts.stopped if "/" in event else counts.events
                kind[pool, lane, event] = kind.get((pool, lane, event), 0) + int(count)
        return counts


def _is_name(model: str) -> bool:
    try:
        check_name(model, "model")
    except BadMessage:
        return False
    return True


def _place(where: str) -> tuple[Pool, Lane, str]:
    """Pool, lane and region of a place; the region is empty for places of all."""
    pool, _, rest = where.rpartition(":")
    lane, _, region = rest.partition("@")
    return Pool(decode_name(pool)), Lane(lane), decode_name(region)
