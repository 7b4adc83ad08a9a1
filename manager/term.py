"""What an acting Manager does to the fleet: one term, from the snapshot it begins with to the lease it loses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from queue_schemas import (
    BrokerUnavailable,
    Control,
    ControlKind,
    Heartbeat,
    InferqError,
    Pool,
    Registration,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
    WorkerInfo,
)
from telemetry import get_logger

from .core import Door, DoorState, Member, Registry, Verdict
from .failure_detector import Clock, FailureDetector, within
from .metrics import FleetMetrics
from .ports import QueuePort, WorkerProbe
from .settings import ManagerSettings
from .shard_sweeps import ShardSweeps

LOOKS_AT_ONCE = 16
"""Most workers looked at in one sweep: a rack that goes down must not hold the others up."""
SNAPSHOT_CHECK_S = 10.0
"""How often the snapshot is read again: a Redis that lost its latest writes, or a late write of the Manager before, may
have made it wrong."""
POOLS_REFRESH_S = 600.0
"""How often a served pool is remembered again; the memory lasts a day."""

log = get_logger(__name__)


class Fleet:
    """The registry of one term and the effects of its decisions."""

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        probe: WorkerProbe,
        metrics: FleetMetrics,
        term: int,
        changed: asyncio.Event,
        clock: Clock = time.monotonic,
    ) -> None:
        self.term = term
        self.registry = Registry(
            term, queue.shard_of, suspect_s=settings.suspect_ms / 1000, lease_s=settings.lease_ms / 1000
        )
        self.changed = changed
        """Set when the registry may differ from its snapshot in Redis."""
        self._settings = settings
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        self._shards = ShardSweeps(settings, queue, clock)
        self._deaths = FailureDetector(settings, queue, probe, metrics, clock, lambda: self._shards.away)
        self._saved: dict[str, WorkerInfo] = {}
        self._loaded_at: float | None = None
        self._check_at = clock() + SNAPSHOT_CHECK_S
        self._pools_due: dict[str, float] = {}
        self._pools_at = clock()
        self._dirty: set[str] = set()
        """Workers whose entries may differ from those in Redis."""
        self._doubted: set[SessionId] = set()
        self._meeting = asyncio.Lock()
        self._joining: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self) -> None:
        """Begin with what the last Manager wrote down."""
        limit = self._settings.broker_call_ms
        snapshot = await within(limit, self._queue.fleet.load_workers())
        self._saved = dict(snapshot)
        self._loaded_at = self._clock()
        self.registry.load(snapshot.values(), self._loaded_at)
        self._dirty |= snapshot.keys()
        self.changed.set()

    # What workers ask for

    async def register(self, registration: Registration) -> Member:
        """Take a worker in. Raises ``WorkerIdTaken`` if another live session id has its id."""
        async with self._one_at_a_time(registration.worker_id):
            current = self.registry.find(registration.worker_id)
            if current is not None and current.session_id != registration.session_id:
                verdict = await self._judge(current, await self._deaths.look(current))
                if verdict is Verdict.ALIVE:
                    raise WorkerIdTaken(
                        f"worker id {registration.worker_id!r} is in use by a live worker ({current.session_id}): "
                        "give this one another --worker-id, or stop that one first"
                    )
                if verdict is Verdict.DEAD:
                    self._bury(current.session_id, "replaced")
                    await self._deaths.reclaim()
            member = self.registry.join(registration, self._clock())
        log.info("worker_joined", worker=member.worker_id, session_id=member.session_id, models=member.status.models)
        self._note(member.worker_id)
        return member

    def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> Member:
        """Take a heartbeat in. Raises ``UnknownWorker``: register again."""
        before = self.registry.find(worker_id)
        member = self.registry.heartbeat(worker_id, heartbeat, self._clock())
        if before is None or _says(before) != _says(member):
            self._note(worker_id)
        elif before.status != member.status:
            self._dirty.add(worker_id)  # how busy it is: the next sweep writes that down
        return member

    async def drain(self, worker_id: str) -> Member:
        """Ask a worker to drain, by its control stream and by its next heartbeat's answer."""
        member = self.registry.drain(worker_id, self._clock())
        self._note(worker_id)
        try:
            call = self._queue.fleet.send_control(member.session_id, Control(ControlKind.DRAIN))
            await within(self._settings.broker_call_ms, call)
        except BrokerUnavailable as error:
            log.warning("drain_not_sent", worker=worker_id, error=error.message, then="its next heartbeat tells it")
        return member

    async def doubt(self, worker_id: str, session_id: SessionId) -> None:
        """Look at once whether a worker is dead whose connection broke, and take back what it held if that is certain.

        Raises broker errors. Doubts of the same session id meanwhile are passed over.
        """
        member = self.registry.find(worker_id)
        if member is None or member.session_id != session_id or not member.verified or session_id in self._doubted:
            return
        self._doubted.add(session_id)
        try:
            await self._doubt(member)
            await self._deaths.reclaim()
        finally:
            self._doubted.discard(session_id)

    def leave(self, worker_id: str, session_id: str) -> None:
        """A worker says goodbye. Raises ``UnknownWorker`` if the id is another session_id's."""
        if not self.registry.leave(worker_id, session_id):
            raise UnknownWorker(f"worker {worker_id!r} is not registered here in session_id {session_id!r}")
        log.info("worker_left", worker=worker_id, session_id=session_id)
        self._note(worker_id)

    def workers(self) -> list[WorkerInfo]:
        now = self._clock()
        return [member.info(now) for member in self.registry.members()]

    # What happens each second

    async def sweep(self) -> None:
        """One round: renewal numbers, the dead, the doubtful, deadlines, states. Bounded in time.

        Raises ``BrokerUnavailable`` (and then no time of stillness counts) if no shard answers, or another broker
        error once what could be done was done.
        """
        await self._look_around()
        self.registry.saw_numbers(await self._shards.look())
        for session_id in self._shards.still():
            self._bury(session_id, "still")
        before = {member.worker_id: member.state for member in self.registry.members()}
        for member in self.registry.sweep(self._clock(), self._shards.__contains__):
            log.warning("worker_forgotten", worker=member.worker_id, session_id=member.session_id)
            self._note(member.worker_id)
        for member in self.registry.members():
            if before.get(member.worker_id) != member.state:
                log.warning("worker_state", worker=member.worker_id, state=str(member.state))
                self._note(member.worker_id)
        if self._dirty or self._clock() >= min(self._check_at, self._pools_at):
            self.changed.set()
        try:
            await self._deaths.reclaim()
        finally:
            swept = await self._shards.expire()
            self._metrics.expired.inc(swept.expired)
            self._metrics.rewoken.inc(swept.woken)

    @property
    def shards_away(self) -> set[int]:
        """The shards that do not answer now."""
        return self._shards.away

    def close(self) -> None:
        """Its term is over."""
        self._shards.close()

    async def save(self) -> None:
        """Write the entries of the registry that changed since the last time, and remember the pools it serves."""
        limit = self._settings.broker_call_ms
        if self._clock() >= self._check_at:
            self._saved = await within(limit, self._queue.fleet.load_workers())
            self._check_at = self._clock() + SNAPSHOT_CHECK_S
            self._dirty |= self._saved.keys() | {member.worker_id for member in self.registry.members()}
        dirty, self._dirty = self._dirty, set()
        try:
            await self._write(dirty)
        except BaseException:
            self._dirty |= dirty
            raise
        if self._clock() >= self._pools_at or dirty:
            await self._remember_pools({model for member in self.registry.members() for model in member.status.models})

    async def _write(self, worker_ids: set[str]) -> None:
        found = {worker_id: self.registry.find(worker_id) for worker_id in worker_ids}
        now = {worker_id: member.info() for worker_id, member in found.items() if member is not None}
        changed = [info for worker_id, info in now.items() if self._saved.get(worker_id) != info]
        gone = [worker_id for worker_id in worker_ids if worker_id in self._saved and worker_id not in now]
        if changed or gone:
            await within(self._settings.broker_call_ms, self._queue.fleet.save_workers(changed, gone))
        self._saved |= now
        for worker_id in gone:
            del self._saved[worker_id]

    async def _remember_pools(self, served: set[str]) -> None:
        now, limit = self._clock(), self._settings.broker_call_ms
        declared = set(self._settings.pools)
        due = {model for model in served | declared if now >= self._pools_due.get(model, now)}
        self._pools_at = min((at for at in self._pools_due.values() if at > now), default=now + POOLS_REFRESH_S)
        if not due:
            return
        self._pools_at = now  # until that is done
        if due & declared:
            await within(limit, self._queue.fleet.remember_pools(sorted(due & declared), declared=True))
        known = await within(limit, self._queue.fleet.known_pools())
        # Remembering a pool that another process declared would end its declaration.
        seen = sorted(model for model in due - declared if not known.get(Pool(model), False))
        if seen:
            await within(limit, self._queue.fleet.remember_pools(seen))
        still_due = {model: due_at for model, due_at in self._pools_due.items() if model in served | declared}
        self._pools_due = still_due | dict.fromkeys(due, now + POOLS_REFRESH_S)
        self._pools_at = min(self._pools_due.values())

    # Doubt

    async def meet(self) -> None:
        """Verify the URLs that are to be looked at now. A worker that dies before its URL was verified once is missed
        by its lease only: so newcomers are not left to the next sweep."""
        async with self._meeting, asyncio.TaskGroup() as tasks:
            for member in self.registry.to_look_at(self._clock(), LOOKS_AT_ONCE):
                tasks.create_task(self._verify(member))

    async def _look_around(self) -> None:
        """Verify new URLs, and declare_dead those of the silent whose death is certain."""
        if not self._meeting.locked():  # who waited for others' looks could watch no renewal numbers meanwhile
            await self.meet()
        now = self._clock()
        silent_s = 2 * self._settings.heartbeat_ms / 1000
        doubted = self.registry.to_doubt(now, silent_s, LOOKS_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for member in doubted:
                tasks.create_task(self._doubt(member))

    async def _verify(self, member: Member) -> None:
        door = await self._deaths.look(member)
        before = self.registry.find(member.worker_id)
        self.registry.looked(member.session_id, door, self._clock())
        now = self.registry.find(member.worker_id)
        if before is None or now is None or _says(before) != _says(now):
            self._note(member.worker_id)
        if door.note and door.note != member.url_note:
            log.warning("worker_url", worker=member.worker_id, note=door.note)

    async def _doubt(self, member: Member) -> None:
        door = await self._deaths.look(member)
        if door.state not in (DoorState.REFUSED, DoorState.OTHER):
            return
        try:
            verdict = await self._judge(member, door)
        except InferqError as error:
            log.info("worker_not_judged", worker=member.worker_id, error=error.message)
            return
        # Meanwhile it may have been heard, have left, or been declared dead by whoever doubted it as well.
        now = self.registry.find(member.worker_id)
        as_before = now is not None and (now.session_id, now.heard_at) == (member.session_id, member.heard_at)
        if verdict is Verdict.DEAD and as_before:
            self._bury(member.session_id, "certain")

    async def _judge(self, member: Member, door: Door) -> Verdict:
        # The snapshot says that a worker was there, not that it is: it may have left while no Manager acted.
        return await self._deaths.judge(member, door, heard=member.heard_at != self._loaded_at)

    def _bury(self, session_id: SessionId, how: str) -> None:
        member = self.registry.declare_dead(session_id)
        self._deaths.note(session_id, member.worker_id if member is not None else "", how)
        if member is not None:
            self._note(member.worker_id)

    def _note(self, worker_id: str) -> None:
        """Write this entry down soon."""
        self._dirty.add(worker_id)
        self.changed.set()

    @asynccontextmanager
    async def _one_at_a_time(self, worker_id: str) -> AsyncIterator[None]:
        lock = self._joining.setdefault(worker_id, asyncio.Lock())
        async with lock:
            yield


def _says(member: Member) -> tuple[object, ...]:
    """What others act on: how busy a worker is changes with each heartbeat, and nobody waits for that."""
    status = member.status
    return (
        member.state, member.assignment, member.verified, member.url_note, status.engine, status.engine_detail,
        status.models, status.cards, status.slots, status.broker_ok,
    )  # fmt: skip
