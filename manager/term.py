"""One term of the acting Manager: what it does for workers that call, and in the sweep of each second."""

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
    Registration,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
    WorkerInfo,
)
from telemetry import get_logger

from .core import Liveness, Member, Registry
from .failure_detector import FailureDetector
from .metrics import FleetMetrics
from .placement.adapters import AdapterPlacement
from .placement.models import ModelPlacement
from .placement.rounds import run_round
from .ports import Clock, QueuePort, WorkerProbe, call_queue
from .registry_snapshot import RegistrySnapshot
from .settings import ManagerSettings
from .shard_sweeps import ShardSweeps

log = get_logger(__name__)


class Term:
    """The registry of the term ``number`` and the effects of its decisions."""

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        probe: WorkerProbe,
        metrics: FleetMetrics,
        number: int,
        changed: asyncio.Event,
        clock: Clock = time.monotonic,
    ) -> None:
        self.number = number
        self.changed = changed
        """Set when the registry may differ from its snapshot in Redis."""
        self.registry = Registry(
            number,
            queue.shard_of,
            unresponsive_s=settings.unresponsive_after_ms / 1000,
            lease_s=settings.lease_ms / 1000,
        )
        self._settings = settings
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        self._shards = ShardSweeps(settings, queue, metrics, clock)
        self._snapshot = RegistrySnapshot(settings, queue, self.registry, changed, clock)
        self._failure_detector = FailureDetector(
            settings, queue, probe, self.registry, self._shards, self._snapshot.save_soon, clock
        )
        save_soon = self._snapshot.save_soon
        self._placements = (
            ModelPlacement(settings, self.registry, metrics, save_soon, clock),
            AdapterPlacement(settings, queue, self.registry, metrics, save_soon, clock),
        )
        self._joining: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self) -> None:
        """Begin with what the last Manager wrote down."""
        workers, adapter_sets = await self._snapshot.load()
        self.registry.load(workers, self._clock(), adapter_sets)

    async def save(self) -> None:
        """Write down what changed."""
        await self._snapshot.save()

    def close(self) -> None:
        """The term is over."""
        self._shards.close()

    @property
    def unreachable_shards(self) -> set[int]:
        """The shards that do not answer now."""
        return self._shards.unreachable

    # What workers ask for

    async def register(self, registration: Registration) -> Member:
        """Take a worker in. Raises ``WorkerIdTaken`` if another live session has its id."""
        async with self._one_at_a_time(registration.worker_id):
            current = self.registry.find(registration.worker_id)
            if current is not None and current.session_id != registration.session_id:
                liveness = await self._failure_detector.assess(current)
                if liveness is Liveness.ALIVE:
                    raise WorkerIdTaken(
                        f"worker id {registration.worker_id!r} is in use by a live worker ({current.session_id}): "
                        "give this one another --worker-id, or stop that one first"
                    )
                if liveness is Liveness.DEAD:
                    self._failure_detector.declare_dead(current.session_id, "replaced")
                    await self._shards.reclaim()
            member = self.registry.join(registration, self._clock())
        log.info("worker_joined", worker=member.worker_id, session_id=member.session_id, models=member.status.models)
        self._snapshot.save_soon(member.worker_id)
        return member

    def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> Member:
        """Take a heartbeat in. Raises ``UnknownWorker``: register again."""
        before = self.registry.find(worker_id)
        member = self.registry.heartbeat(worker_id, heartbeat, self._clock())
        if before is None or before.visible != member.visible:
            self._snapshot.save_soon(worker_id)
        elif before.status != member.status:
            self._snapshot.save_later(worker_id)
        return member

    async def drain(self, worker_id: str) -> Member:
        """Ask a worker to drain, by its control stream and by its next heartbeat's answer."""
        member = self.registry.drain(worker_id, self._clock())
        self._snapshot.save_soon(worker_id)
        try:
            call = self._queue.fleet.send_control(member.session_id, Control(ControlKind.DRAIN))
            await call_queue(self._settings.broker_timeout_ms, call)
        except BrokerUnavailable as error:
            log.warning(
                "drain_not_sent", worker=worker_id, error=error.message, then="its next heartbeat is answered so"
            )
        return member

    async def check(self, worker_id: str, session_id: SessionId) -> None:
        """Check whether a session is dead whose connection broke, and reclaim its jobs if it is. Raises broker
        errors."""
        await self._failure_detector.check(worker_id, session_id)

    def leave(self, worker_id: str, session_id: str) -> None:
        """Forget a worker that deregisters. Raises ``UnknownWorker`` if the id is another session's."""
        if not self.registry.leave(worker_id, session_id):
            raise UnknownWorker(f"worker {worker_id!r} is not registered here in session {session_id!r}")
        log.info("worker_left", worker=worker_id, session_id=session_id)
        self._snapshot.save_soon(worker_id)

    def workers(self) -> list[WorkerInfo]:
        """All workers, by id."""
        now = self._clock()
        return [member.info(now) for member in self.registry.members()]

    # What happens by time

    async def verify_urls(self) -> None:
        """Probe the URLs of newcomers."""
        await self._failure_detector.verify_urls()

    async def sweep(self) -> None:
        """One round: overdue workers, renewal counters, states, jobs of the dead, deadlines, models and adapters to
        load. Bounded in time.

        Raises ``BrokerUnavailable`` (and then no time of stillness counts) if no shard answers, or another broker
        error once what could be done was done.
        """
        await self._failure_detector.verify_urls_unless_busy()
        await self._failure_detector.check_overdue()
        self.registry.saw_counters(await self._shards.poll())
        for session_id in self._shards.expired_leases():
            self._failure_detector.declare_dead(session_id, "lease")
        self._update_states()
        self._snapshot.save_if_due()
        try:
            await self._shards.reclaim()
        finally:
            swept = await self._shards.expire()
            self._metrics.expired.inc(swept.expired)
            self._metrics.woken.inc(swept.woken)
        await run_round(self._placements, self._queue, self._settings.broker_timeout_ms)

    def _update_states(self) -> None:
        before = {member.worker_id: member.state for member in self.registry.members()}
        for member in self.registry.sweep(self._clock(), self._shards.has_counter):
            log.warning("worker_forgotten", worker=member.worker_id, session_id=member.session_id)
            self._snapshot.save_soon(member.worker_id)
        for member in self.registry.members():
            if before.get(member.worker_id) != member.state:
                log.warning("worker_state_changed", worker=member.worker_id, state=str(member.state))
                self._snapshot.save_soon(member.worker_id)

    @asynccontextmanager
    async def _one_at_a_time(self, worker_id: str) -> AsyncIterator[None]:
        lock = self._joining.setdefault(worker_id, asyncio.Lock())
        async with lock:
            yield
