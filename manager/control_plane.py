"""The Manager: connects, acts while it holds the lease in Redis, stands by while another does.

:class:`ManagerService` is what serves its API (:func:`manager.routes.create_app`) and what an actor may wrap: its
methods take and give messages of :mod:`queue_schemas`. The whole process is in :mod:`manager.service`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

from pydantic import ValidationError

from queue_schemas import (
    BrokerAddress,
    BrokerUnsuitable,
    Heartbeat,
    HeartbeatAnswer,
    InferqError,
    ManagerUnavailable,
    ModelNotFound,
    PoolDepth,
    PoolList,
    Registration,
    RegistrationAnswer,
    SessionId,
    WorkerInfo,
    WorkerList,
    new_session_id,
)
from queue_schemas.fleet.acting_manager import prove_address
from queue_schemas.fleet.pools import describe_pools
from telemetry import MetricsRegistry, get_logger
from telemetry.backoff import Backoff
from telemetry.redaction import without_credentials

from .failure_detector import Clock, within
from .forwarding import ActingElsewhere
from .metrics import FleetMetrics
from .ports import QueuePort, WorkerProbe
from .settings import ManagerSettings
from .term import Fleet

_CONNECT_BACKOFF = Backoff(0.1, 3.0)
SAVE_PAUSE_S, FAILED_SAVE_PAUSE_S = 0.05, 0.5
VET_EVERY_S = 2.0

OpenQueue = Callable[[], AbstractAsyncContextManager[QueuePort]]
ANOTHER_ACTS = "another Manager acts"
"""Why a Manager stands by that is as it should be."""


class NotActing(ManagerUnavailable):
    """Only the acting Manager may answer this, and this one does not act."""


log = get_logger(__name__)


class ManagerService:
    """One Manager. :meth:`run` is its life; the other methods answer workers, Routers and people.

    They raise ``ManagerUnavailable`` while the queue cannot be reached and, those that change something, ``NotActing``
    while another Manager acts. ``url`` is where the others reach this one; it is written into Redis while it acts.
    """

    def __init__(
        self,
        settings: ManagerSettings,
        open_queue: OpenQueue,
        probe: WorkerProbe,
        *,
        broker_url: str,
        url: str = "",
        metrics: MetricsRegistry | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.settings = settings
        self.manager_id = str(new_session_id("manager"))
        self.metrics = FleetMetrics(metrics or MetricsRegistry("manager"))
        self._open_queue = open_queue
        self._probe = probe
        told = settings.advertised_redis_url or broker_url
        # Without a join token any program of this machine may ask: none is told a password.
        self._broker_url = told if settings.join_token.get_secret_value() else without_credentials(told)
        self._clock = clock
        self._queue: QueuePort | None = None
        self._fleet: Fleet | None = None
        self._acting_until = 0.0
        self.stopping = False
        """Whether it was told to end."""
        join_token = settings.join_token.get_secret_value()
        self._url = url
        self._proof = prove_address(join_token, self.manager_id, url) if url else ""
        self.elsewhere = ActingElsewhere(self.manager_id, url, join_token, settings.broker_call_ms)
        self._changed = asyncio.Event()
        self._newcomers = asyncio.Event()
        self._problem = "the queue's Redis has not been reached yet"
        self._server_faults: list[str] = []
        self.metrics.registry.watch_round_trips(lambda: self._queue.round_trips if self._queue else 0)

    # Its life

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set, then hand the acting lease back.

        Waits for a Redis that is not there and survives one that goes away. Raises ``BrokerUnsuitable`` if the Redis
        that answers cannot carry the queue.
        """
        async with AsyncExitStack() as exits:
            queue = await self._connect(exits, stop)
            if queue is None:
                return
            self._queue = queue
            try:
                async with asyncio.TaskGroup() as tasks:
                    loops = [
                        tasks.create_task(self._hold_office(queue), name="manager: acting lease"),
                        tasks.create_task(self._sweep(), name="manager: sweep"),
                        tasks.create_task(self._meet(), name="manager: newcomers"),
                        tasks.create_task(self._save(), name="manager: snapshot"),
                        tasks.create_task(self._vet(queue), name="manager: the queue's servers"),
                    ]
                    await stop.wait()
                    self.stopping = True
                    for loop in loops:
                        loop.cancel()
            finally:
                await self._write_down()
                await self._resign(queue)
                await self.elsewhere.close()
                self._queue = None
                self._problem = "the Manager is shutting down"

    async def _connect(self, exits: AsyncExitStack, stop: asyncio.Event) -> QueuePort | None:
        failures = 0
        while not stop.is_set():
            try:
                return await exits.enter_async_context(self._open_queue())
            except BrokerUnsuitable:
                raise
            except InferqError as error:
                self._problem = error.public
                failures += 1
                pause = _CONNECT_BACKOFF.pause_s(failures)
                log.warning("broker_unavailable", error=error.message, again_in_s=pause)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stop.wait()
        return None

    async def _hold_office(self, queue: QueuePort) -> None:
        """Take or keep the acting lease, three times within its life."""
        ttl_ms = self.settings.acting_ttl_ms
        while True:
            begun = self._clock()
            try:
                taking = queue.fleet.acquire_leader_lease(self.manager_id, ttl_ms, self._url, self._proof)
                term = await within(min(self.settings.broker_call_ms, ttl_ms), taking)
                if term is None:
                    self._step_down(ANOTHER_ACTS)
                    await self.elsewhere.look(queue)
                else:
                    if self._fleet is None or self._fleet.term != term:
                        await self._take_office(queue, term)
                    self._acting_until = begun + ttl_ms / 1000
            except InferqError as error:
                self._trouble("acting_lease_not_renewed", error)
                if self._clock() >= self._acting_until:
                    self._step_down(error.public)
            await asyncio.sleep(ttl_ms / 3000)

    async def _take_office(self, queue: QueuePort, term: int) -> None:
        fleet = Fleet(self.settings, queue, self._probe, self.metrics, term, self._changed, self._clock)
        try:
            await fleet.load()
        except ValidationError as error:
            # A snapshot of a version that we cannot read: the next heartbeats tell all that is in it.
            log.warning("registry_snapshot_unreadable", error=str(error))
        self._fleet = fleet
        self.elsewhere.url = ""
        self._newcomers.set()
        self._problem = ""
        self.metrics.acting.set(1)
        log.info("acting", term=term, workers=len(fleet.registry.members()))

    def _step_down(self, why: str) -> None:
        self._problem = f"standing by: {why}"
        if self._fleet is not None:
            log.warning("standing_by", why=why)
            self._fleet.close()
            self._fleet = None
            self.metrics.acting.set(0)

    async def _write_down(self) -> None:
        """The last changes: of workers that said goodbye a moment ago the next Manager must not wait for more."""
        fleet = self._acting()
        if fleet is not None:
            try:
                await fleet.save()
            except InferqError as error:
                log.info("registry_not_saved", error=error.message, then="the next heartbeats tell what is in it")

    async def _resign(self, queue: QueuePort) -> None:
        self._step_down("the Manager is shutting down")
        try:
            await within(self.settings.broker_call_ms, queue.fleet.release_leader_lease(self.manager_id))
        except InferqError as error:
            log.info("not_resigned", error=error.message, then="the lease runs out by itself")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_ms / 1000)
            fleet = self._acting()
            if fleet is None:
                continue
            try:
                await fleet.sweep()
                self._problem = ""
            except InferqError as error:
                self._trouble("sweep_failed", error)

    async def _vet(self, queue: QueuePort) -> None:
        """Look whether the queue's servers are still fit."""
        while True:
            self._server_faults = await queue.server_faults()
            await asyncio.sleep(VET_EVERY_S)

    async def _meet(self) -> None:
        """Look at newcomers as they come."""
        while True:
            await self._newcomers.wait()
            self._newcomers.clear()
            fleet = self._acting()
            if fleet is not None:
                await fleet.meet()

    def _trouble(self, event: str, error: InferqError) -> None:
        """Note what is wrong; of an outage the first line says all, so the following ones are for debugging."""
        (log.warning if not self._problem else log.debug)(event, error=error.message)
        self._problem = error.public

    async def _save(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            pause = SAVE_PAUSE_S
            fleet = self._acting()
            if fleet is not None:
                try:
                    await fleet.save()
                except InferqError as error:
                    log.warning("registry_not_saved", error=error.message)
                    self._changed.set()
                    pause = FAILED_SAVE_PAUSE_S
            await asyncio.sleep(pause)

    # What it answers

    @property
    def acting(self) -> bool:
        """Whether this Manager decides now."""
        return self._acting() is not None

    def not_ready(self) -> list[str]:
        """Why it cannot do its work, in sentences; empty when it can."""
        if self.acting and not self._problem:
            return list(self._server_faults)
        problem = self._problem or "standing by: the acting lease was not renewed in time"
        return list(dict.fromkeys([problem, *self._server_faults]))

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """A worker joins, or joins again. Raises ``WorkerIdTaken``."""
        fleet = self._in_office()
        member = await fleet.register(registration)
        self._newcomers.set()
        if self._in_office() is not fleet:
            why = "the acting Manager changed meanwhile: register again"
            raise ManagerUnavailable(why, retry_after_s=1, public=why)
        return RegistrationAnswer(
            broker_url=self._broker_url,
            shards=self._reached().shards,
            lease_ms=self.settings.lease_ms,
            heartbeat_ms=self.settings.heartbeat_ms,
            assignment=member.assignment,
        )

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Raises ``UnknownWorker``: the worker registers again and keeps its jobs."""
        member = self._in_office().heartbeat(worker_id, heartbeat)
        return HeartbeatAnswer(assignment=member.assignment, drain=member.drain_asked)

    async def deregister(self, worker_id: str, session_id: str) -> None:
        """A worker says goodbye. Raises ``UnknownWorker``."""
        self._in_office().leave(worker_id, session_id)

    async def drain(self, worker_id: str) -> WorkerInfo:
        """Ask a worker to finish what it runs and end. Raises ``UnknownWorker``."""
        member = await self._in_office().drain(worker_id)
        return member.info(self._clock())

    @property
    def in_touch(self) -> bool:
        """Whether calls to this Manager reach the acting one: it acts, or knows the acting one's address."""
        return self.acting or bool(self.elsewhere.url)

    def check_in_touch(self) -> None:
        """Raises ``NotActing`` unless :attr:`in_touch`."""
        if not self.in_touch:
            self._in_office()

    async def doubt(self, worker_id: str, session_id: SessionId) -> None:
        """The connection that a worker held open broke: find out now whether it is dead. That is only a hint: nobody is
        declared dead whose port or ping answers. Raises ``NotActing``."""
        if self.stopping:
            return
        fleet = self._in_office()
        try:
            await fleet.doubt(worker_id, session_id)
        except InferqError as error:
            log.info("worker_not_judged", worker=worker_id, error=error.message, then="the sweep goes on with it")

    async def list_workers(self) -> WorkerList:
        """The fleet; in standby as the acting Manager last wrote it down."""
        fleet = self._acting()
        if fleet is not None:
            return WorkerList(workers=fleet.workers(), manager=self.manager_id, term=fleet.term)
        snapshot = await within(self.settings.broker_call_ms, self._reached().fleet.load_workers())
        return WorkerList(workers=[snapshot[worker_id] for worker_id in sorted(snapshot)])

    async def broker_address(self) -> BrokerAddress:
        """Where a Router finds the queue."""
        return BrokerAddress(broker_url=self._broker_url, shards=self._reached().shards)

    async def pools(self) -> PoolList:
        """Every pool that is known, with what waits, what runs, and who serves it."""
        queue, limit = self._reached(), self.settings.broker_call_ms
        workers = (await self.list_workers()).workers
        away: set[int] = set()
        depths = await within(limit, queue.stats.depths(away))
        known = await within(limit, queue.fleet.known_pools())
        pools = describe_pools(depths, workers, known)
        # Of a pool whose shard does not answer nothing is known: least of all that nothing waits there.
        return PoolList(pools=[pool for pool in pools if queue.shard_of(pool.model) not in away])

    async def pool(self, model: str) -> PoolDepth:
        """One of :meth:`pools`. Raises ``ModelNotFound`` for a model nobody knows."""
        for pool in (await self.pools()).pools:
            if pool.model == model:
                return pool
        if self._fleet is not None and self._reached().shard_of(model) in self._fleet.shards_away:
            raise ManagerUnavailable(f"the part of the queue that holds {model!r} does not answer now", retry_after_s=2)
        raise ModelNotFound(f"no pool of model {model!r} is known: see GET /fabric/v1/pools", param="model")

    async def show_metrics(self) -> None:
        """Bring the gauges up to date, for a scrape."""
        try:
            self.metrics.show_workers((await self.list_workers()).workers)
            self.metrics.show_pools((await self.pools()).pools)
            self.metrics.show_counts(
                await within(self.settings.broker_call_ms, self._reached().stats.job_counts(set()))
            )
        except InferqError as error:
            self.metrics.forget_pools()
            log.info("figures_not_had", error=error.message)

    def _acting(self) -> Fleet | None:
        return self._fleet if self._fleet is not None and self._clock() < self._acting_until else None

    def _in_office(self) -> Fleet:
        fleet = self._acting()
        if fleet is None:
            why = f"this Manager does not act now ({self.not_ready()[0]})"
            raise NotActing(why, retry_after_s=2, public=why)
        return fleet

    def _reached(self) -> QueuePort:
        if self._queue is None:
            raise ManagerUnavailable(self._problem, retry_after_s=2, public=self._problem)
        return self._queue
