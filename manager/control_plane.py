"""The Manager: connects to the queue, competes for the leader lease, and answers workers, Routers and people.

:class:`ManagerService` is what serves its API (:func:`manager.routes.create_app`) and what an actor may wrap: its
methods take and give messages of :mod:`queue_schemas`. The whole process is in :mod:`manager.service`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

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
from queue_schemas.fleet.messages import AutoscalerAnswer, AutoscalerClaim
from queue_schemas.fleet.pools import describe_pools
from telemetry import MetricsRegistry, get_logger
from telemetry.backoff import Backoff
from telemetry.redaction import without_credentials

from .forwarding import ActingManagerClient
from .leadership import ANOTHER_ACTS, Leadership, NotActing
from .metrics import FleetMetrics
from .ports import Clock, QueuePort, WorkerProbe, call_queue
from .settings import ManagerSettings
from .term import Term

__all__ = ["ANOTHER_ACTS", "ManagerService", "NotActing", "OpenQueue"]

VET_EVERY_S = 2.0
_CONNECT = Backoff(0.1, 3.0)

OpenQueue = Callable[[], AbstractAsyncContextManager[QueuePort]]

log = get_logger(__name__)


class ManagerService:
    """One Manager. :meth:`run` works until its ``stop`` is set; the other methods answer workers, Routers and people.

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
        join_token = settings.join_token.get_secret_value()
        self.acting_manager = ActingManagerClient(self.manager_id, url, join_token, settings.broker_timeout_ms)
        self.stopping = False
        """Whether it was told to end."""
        self._open_queue = open_queue
        advertised = settings.advertised_redis_url or broker_url
        # Without a join token any program of this machine may ask: so it gets no password.
        self._broker_url = advertised if join_token else without_credentials(advertised)
        self._clock = clock
        self._queue: QueuePort | None = None
        self._leadership = Leadership(
            settings, probe, self.metrics, self.acting_manager, manager_id=self.manager_id, url=url, clock=clock
        )
        self._server_faults: list[str] = []
        self.metrics.registry.watch_round_trips(lambda: self._queue.round_trips if self._queue else 0)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set, then release the leader lease.

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
                    leading = tasks.create_task(self._leadership.run(queue), name="manager: leadership")
                    vetting = tasks.create_task(self._vet(queue), name="manager: the queue's servers")
                    await stop.wait()
                    self.stopping = True
                    leading.cancel()
                    vetting.cancel()
            finally:
                await self.acting_manager.close()
                self._queue = None
                self._leadership.problem = "the Manager is shutting down"

    async def _connect(self, exits: AsyncExitStack, stop: asyncio.Event) -> QueuePort | None:
        failures = 0
        while not stop.is_set():
            try:
                return await exits.enter_async_context(self._open_queue())
            except BrokerUnsuitable:
                raise
            except InferqError as error:
                failures += 1
                pause = _CONNECT.pause_s(failures)
                self._leadership.problem = error.public
                log.warning("queue_unreachable", error=error.message, again_in_s=round(pause, 1))
            try:
                async with asyncio.timeout(pause):
                    await stop.wait()
            except TimeoutError:
                continue
        return None

    async def _vet(self, queue: QueuePort) -> None:
        """Find out again and again whether the queue's servers are still fit."""
        while True:
            self._server_faults = await queue.server_faults()
            await asyncio.sleep(VET_EVERY_S)

    @property
    def acting(self) -> bool:
        """Whether this Manager decides now."""
        return self._leadership.term is not None

    @property
    def reaches_acting(self) -> bool:
        """Whether calls to this Manager reach the acting one: it acts, or knows the acting one's address."""
        return self.acting or bool(self.acting_manager.url)

    def require_acting_reached(self) -> None:
        """Raises ``NotActing`` unless :attr:`reaches_acting`."""
        if not self.reaches_acting:
            self._acting_term()

    def not_ready(self) -> list[str]:
        """Why it cannot do its work, in sentences; empty when it can."""
        problem = self._leadership.problem
        if self.acting and not problem:
            return list(self._server_faults)
        problem = problem or "standing by: the leader lease was not renewed in time"
        return list(dict.fromkeys([problem, *self._server_faults]))

    # Calls of workers

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """A worker joins, or joins again. Raises ``WorkerIdTaken``."""
        term = self._acting_term()
        member = await term.register(registration)
        self._leadership.verify_newcomers()
        if self._acting_term() is not term:
            why = "the acting Manager changed meanwhile: register again"
            raise ManagerUnavailable(why, retry_after_s=1, public=why)
        return RegistrationAnswer(
            broker_url=self._broker_url,
            shards=self._reached().shards,
            lease_ms=self.settings.lease_ms,
            heartbeat_interval_ms=self.settings.heartbeat_interval_ms,
            assignment=member.assignment,
        )

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Raises ``UnknownWorker``: the worker registers again and keeps its jobs."""
        member = self._acting_term().heartbeat(worker_id, heartbeat)
        return HeartbeatAnswer(assignment=member.assignment, drain=member.drain_asked)

    async def deregister(self, worker_id: str, session_id: str) -> None:
        """A worker deregisters. Raises ``UnknownWorker``."""
        self._acting_term().leave(worker_id, session_id)

    async def drain(self, worker_id: str) -> WorkerInfo:
        """Ask a worker to finish what it runs and end. Raises ``UnknownWorker``."""
        member = await self._acting_term().drain(worker_id)
        return member.info(self._clock())

    async def check(self, worker_id: str, session_id: SessionId) -> None:
        """The connection that a session held open broke: find out now whether it is dead. The broken connection is only
        a hint: no session is declared dead whose port or ping answers. Raises ``NotActing``."""
        if self.stopping:
            return
        term = self._acting_term()
        try:
            await term.check(worker_id, session_id)
        except InferqError as error:
            log.info("worker_check_failed", worker=worker_id, error=error.message, then="the sweeps go on with it")

    # The fleet and the queue, for people, Routers and autoscalers

    async def list_workers(self) -> WorkerList:
        """The fleet; in standby as the acting Manager last wrote it down."""
        term = self._leadership.term
        if term is not None:
            return WorkerList(workers=term.workers(), manager=self.manager_id, term=term.number)
        snapshot = await call_queue(self.settings.broker_timeout_ms, self._reached().fleet.load_workers())
        return WorkerList(workers=[snapshot[worker_id] for worker_id in sorted(snapshot)])

    async def broker_address(self) -> BrokerAddress:
        """Where a Router finds the queue."""
        return BrokerAddress(broker_url=self._broker_url, shards=self._reached().shards)

    async def pools(self) -> PoolList:
        """Every pool that is known, with what waits, what runs, and who serves it."""
        queue, limit = self._reached(), self.settings.broker_timeout_ms
        workers = (await self.list_workers()).workers
        away: set[int] = set()
        depths = await call_queue(limit, queue.stats.depths(away))
        known = (await call_queue(limit, queue.known_pools.remembered())).known
        pools = describe_pools(depths, workers, known)
        # Of a pool whose shard does not answer nothing is known: least of all that nothing waits there.
        return PoolList(pools=[pool for pool in pools if queue.shard_of(pool.model) not in away])

    async def pool(self, model: str) -> PoolDepth:
        """One of :meth:`pools`. Raises ``ModelNotFound`` for an unknown model."""
        for pool in (await self.pools()).pools:
            if pool.model == model:
                return pool
        if self._reached().shard_of(model) in self._leadership.unreachable_shards:
            raise ManagerUnavailable(f"the part of the queue that holds {model!r} does not answer now", retry_after_s=2)
        raise ModelNotFound(f"no pool of model {model!r} is known: see GET /fabric/v1/pools", param="model")

    async def claim_pool(self, claim: AutoscalerClaim) -> AutoscalerAnswer:
        """An autoscaler acts for a pool, which is declared by that. Redis decides, so any Manager answers."""
        call = self._reached().known_pools.claim(claim.pool, claim.autoscaler_id, claim.ttl_ms)
        return AutoscalerAnswer(acting=await call_queue(self.settings.broker_timeout_ms, call))

    async def show_metrics(self) -> None:
        """Bring the gauges up to date, for a scrape."""
        try:
            self.metrics.show_workers((await self.list_workers()).workers)
            self.metrics.show_pools((await self.pools()).pools)
            counting = self._reached().stats.job_counts(set())
            self.metrics.show_counts(await call_queue(self.settings.broker_timeout_ms, counting))
        except InferqError as error:
            self.metrics.forget_pools()
            log.info("metrics_not_updated", error=error.message)

    def _acting_term(self) -> Term:
        term = self._leadership.term
        if term is None:
            why = f"this Manager does not act now ({self.not_ready()[0]})"
            raise NotActing(why, retry_after_s=2, public=why)
        return term

    def _reached(self) -> QueuePort:
        if self._queue is None:
            why = self._leadership.problem
            raise ManagerUnavailable(why, retry_after_s=2, public=why)
        return self._queue
