"""One worker session: from a registration until the worker has drained, or was declared dead."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import NoReturn

from queue_schemas import Assignment, EngineState, Fenced, InferqError, SessionId, WorkerStatus, shard_of_job
from scheduling.preemption import YieldPolicy
from scheduling.slots import SlotBounds
from telemetry import get_logger

from .attempts import Attempt, Attempts, StopReason, StreamTimeouts
from .attempts.adapter_loads import AdapterLoads
from .attempts.model_swap import ModelSwap
from .attempts.waiting import within
from .context import WorkerContext
from .core import EngineProgress, LoopWatchdog, Slots
from .engines import StepReader
from .engines.adapter_folder import AdapterFolder
from .fallback_sweeper import FallbackSweeper
from .frame_batcher import FrameBatcher
from .lease_renewals import RENEWALS_PER_LEASE, LeaseRenewals
from .load_monitor import LoadMonitor
from .over_http.queue import HttpQueue
from .peers import Peers
from .preemption import Preemption
from .queue import Queue
from .registration.membership import Membership
from .shard_consumer import ShardConsumer

SWEEP_S = 0.25
ADAPTERS_SCAN_S = 10.0
LEAVE_TIMEOUT_S = 5.0
_JOIN_PAUSE_S = 2.0

log = get_logger(__name__)


class WorkerSession:
    """Registers, claims, runs jobs and answers as ``session_id``."""

    def __init__(self, context: WorkerContext, session_id: SessionId) -> None:
        settings = context.settings
        self.session_id = session_id
        self.slots = Slots(settings.slots)
        self.load_monitor = LoadMonitor(
            context.engine,
            self.slots,
            SlotBounds(settings.slots, settings.max_slots or settings.slots),
            settings.engine_load_interval_ms / 1000,
            limit_changed=self._limit_changed,
            cache_changed=self._reconsider,
        )
        self.broker_ok = False
        self._context = context
        self._model_swap = ModelSwap(context)
        self._adapters: AdapterLoads | None = None
        if context.adapters is not None:
            self._adapters = AdapterLoads(context, context.adapters, self._adapters_changed)
        self._membership = Membership(
            context.client,
            settings.name,
            url=context.url,
            region=settings.region,
            loadable=context.switching.loadable if context.switching is not None else (),
            adapters=context.adapters,
            metrics=context.metrics,
            status=self.status,
            assigned=self._assigned,
            drain=context.drain.set,
        )
        self._engine_progress = EngineProgress(settings.engine_stall_timeout_ms / 1000)
        self._consumers: list[ShardConsumer] = []
        self._unreachable_shards: set[int] = set()
        """Shards whose server does not answer now."""
        self._watchdog = LoopWatchdog(time.monotonic(), settings.loop_stall_timeout_ms / 1000)
        self._renewing: asyncio.Task[None] | None = None
        self._queue: Queue | None = None
        self._attempts: Attempts | None = None
        self._preemption: Preemption | None = None

    @property
    def problems(self) -> list[str]:
        """Why it cannot run jobs now, in sentences."""
        engine = self._context.engine
        reasons = []
        if self._context.drain.is_set():
            reasons.append("the worker is draining")
        if engine.state is not EngineState.READY:
            reasons.append(f"the engine is {engine.state.value}: {engine.detail}")
        if self._membership.problem:
            reasons.append(self._membership.problem)
        if not self.broker_ok:
            reasons.append("the queue's Redis is not reached")
        return reasons

    def status(self) -> WorkerStatus:
        """What this worker says of itself."""
        engine = self._context.engine
        return WorkerStatus(
            session_id=self.session_id,
            models=list(engine.models),
            cards=dict(engine.cards),
            slots=self.slots.total,
            running=self.slots.busy,
            engine=engine.state,
            engine_detail=engine.detail[:2_000],
            broker_ok=self.broker_ok,
            draining=self._context.drain.is_set(),
            term=max(self.slots.order[0], 0),
            loaded=self._context.switching.loaded if self._context.switching is not None else "",
            adapter_room=self._adapters.room if self._adapters is not None else 0,
            adapter_failures=dict(self._adapters.failures) if self._adapters is not None else {},
        )

    def engine_changed(self) -> None:
        """The engine's state or models are others now."""
        self.slots.engine_is(ready=self._context.engine.state is EngineState.READY)
        if self._adapters is not None:
            self._adapters.engine_changed()
        self._reconsider()
        self._membership.notify()

    async def run(self, *, first: bool) -> None:
        """Live until drained. Raises ``Fenced`` when declared dead, within an exception group, as all errors."""
        async with asyncio.TaskGroup() as group:
            working = group.create_task(self._work(first), name="worker")
            await self._context.drain.wait()
            await self._finish()
            working.cancel()

    async def _work(self, first: bool) -> None:
        settings = self._context.settings
        answer = await self._membership.register(first=first)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._membership.run(), name="heartbeats")
            group.create_task(self._membership.hold_session_connection(self.session_id), name="session connection")
            queue = await self._context.connect(answer)
            unjoined = await self._join(queue)
            served_elsewhere = (
                queue.is_served_elsewhere
                if isinstance(queue, HttpQueue)
                else Peers(queue, self.session_id).is_served_elsewhere
            )
            frame_batcher = FrameBatcher(
                queue.attempts.publish,
                queue.attempts.append,
                interval_ms=self._context.settings.flush_interval_ms,
                limit_bytes=self._context.settings.frame_buffer_bytes,
            )
            step_reader = StepReader(frame_batcher.flush, max_wait_s=self._context.settings.flush_interval_ms / 1000)
            attempts = Attempts(
                self._context.engine,
                queue,
                frame_batcher,
                step_reader,
                self._context.metrics,
                max_answer_bytes=self._context.settings.max_answer_bytes,
                other_worker_serves=served_elsewhere,
                preemption=settings.preemption,
                ended=self._ended,
            )
            self._queue, self._attempts = queue, attempts
            policy = YieldPolicy(settings.preemption_share, settings.preemption_min_gain_ms / 1000)
            preemption = self._preemption = Preemption(
                queue, policy, self.slots, attempts, self._context.metrics, settings.region
            )
            group.create_task(frame_batcher.run(), name="frame batcher")
            group.create_task(step_reader.run(), name="step reader")
            lease_s = answer.lease_ms / 1000
            self._watchdog.ticked_at = time.monotonic()
            renewals = LeaseRenewals(queue.workers.renewer_apart(), self.session_id, self._watchdog, lease_s)
            self._renewing = group.create_task(renewals.run(), name="lease renewals")
            group.create_task(self._watch_engine(attempts, lease_s), name="engine's progress")
            group.create_task(self._sweep(attempts), name="sweep")
            group.create_task(self.load_monitor.run(), name="load monitor")
            group.create_task(self._model_swap.run(attempts), name="model swap")
            if self._adapters is not None:
                group.create_task(self._adapters.run(attempts), name="adapters")
            if self._context.adapters is not None:
                group.create_task(self._watch_folder(self._context.adapters), name="folder of adapters")
            if not isinstance(queue, HttpQueue):  # one over HTTP may not touch others' jobs
                sweeper = FallbackSweeper(queue, self.session_id, self._context.metrics, lease_s)
                group.create_task(sweeper.run(), name="fallback sweeper")
            self._consumers = [
                ShardConsumer(
                    shard,
                    queue,
                    self.session_id,
                    self.slots,
                    attempts,
                    self._context,
                    reachable=self._shard_reachable,
                    answer_ping=partial(self._answer_ping, renewals),
                    preemption=preemption,
                    adapters=self._adapters,
                )
                for shard in range(queue.shards)
            ]
            for shard, consumer in enumerate(self._consumers):
                group.create_task(consumer.run(group, joined=shard not in unjoined), name=f"shard {shard}")
            self.engine_changed()

    def _answer_ping(self, renewals: LeaseRenewals) -> None:
        """The Manager checks this session, or has something to tell it."""
        renewals.answer_ping()
        self._membership.notify()

    async def _join(self, queue: Queue) -> set[int]:
        """Join every shard that answers, at least one; those that did not."""
        while True:
            try:
                unjoined = await queue.workers.join(self.session_id)
            except Fenced:
                raise
            except InferqError as error:
                # Whatever Redis says short of a verdict on this session id, it may say otherwise soon.
                log.warning("queue_not_joined", error=error.message)
                await asyncio.sleep(_JOIN_PAUSE_S)
            else:
                if unjoined:
                    log.warning("shards_not_joined", shards=sorted(unjoined), then="they are joined when they answer")
                self._set_broker_ok(True)
                return unjoined

    async def _watch_engine(self, attempts: Attempts, lease_s: float) -> NoReturn:
        """Find out, as often as leases are renewed, whether they may be."""
        while True:
            alive = await self._makes_progress(attempts)
            if self._watchdog.engine_alive and not alive:
                log.warning("engine_makes_no_progress", running=len(attempts), then="its jobs go to others")
            self._watchdog.engine_alive = alive
            await asyncio.sleep(lease_s / RENEWALS_PER_LEASE)

    async def _makes_progress(self, attempts: Attempts) -> bool:
        now = asyncio.get_running_loop().time
        if self._engine_progress.shown_by_output(len(attempts), attempts.output_count, now()):
            return True
        return self._engine_progress.believed(await self._context.engine.progress(), now())

    async def _sweep(self, attempts: Attempts) -> NoReturn:
        """What is due by time, for all jobs at once; and that this loop turns."""
        now = asyncio.get_running_loop().time
        settings = self._context.settings
        timeouts = StreamTimeouts(settings.stream_idle_timeout_ms / 1000, settings.buffered_stream_timeout_ms / 1000)
        while True:
            await asyncio.sleep(SWEEP_S)
            self._watchdog.ticked_at = time.monotonic()
            attempts.stop_late(now())
            attempts.stop_stalled(now(), timeouts)
            self._reconsider()  # also for a shard that found no free slot while another one's claim was under way

    async def _finish(self) -> None:
        """Claim no more, let running jobs end, hand the rest back, leave."""
        timeout_s = self._context.settings.drain_timeout_ms / 1000
        self.slots.draining = True
        self._reconsider()
        self._membership.notify()
        attempts, queue = self._attempts, self._queue
        if attempts is not None and queue is not None:
            log.info("draining", running=len(attempts), timeout_s=timeout_s)
            await attempts.finish(timeout_s, self._context.hurry)
            if self._renewing is not None:
                self._renewing.cancel()  # no lease is left, and a session that has left is answered FENCED
            await within(self._leave(queue), LEAVE_TIMEOUT_S)
        if self._membership.registered:
            await within(self._deregister(), LEAVE_TIMEOUT_S)

    async def _leave(self, queue: Queue) -> None:
        try:
            await queue.workers.leave(self.session_id)
        except InferqError as error:
            log.warning("queue_not_left", error=error.message)

    async def _deregister(self) -> None:
        try:
            await self._context.client.deregister(self._context.settings.name, self.session_id)
        except InferqError as error:
            log.warning("not_deregistered", error=error.message)

    def _assigned(self, assignment: Assignment, *, registered: bool) -> None:
        if assignment.order == self.slots.order and not registered:
            return  # as nearly every heartbeat says
        if self.slots.assign(assignment, registered=registered):
            log.info("assignment_changed", version=assignment.version, pools=[part.pool for part in assignment.pools])
            self._model_swap.want(assignment.load)
            if self._adapters is not None:
                self._adapters.want(assignment.adapters)
            self._reconsider()

    def _adapters_changed(self) -> None:
        self._membership.notify()

    async def _watch_folder(self, folder: AdapterFolder) -> NoReturn:
        """Register again when there are other adapters than before."""
        while True:
            await asyncio.sleep(ADAPTERS_SCAN_S)
            if await asyncio.to_thread(folder.scan):
                self._membership.register_again()

    def _ended(self, attempt: Attempt, wait_s: float | None) -> None:
        self.slots.freed()
        if self._preemption is not None:
            self._preemption.ended(attempt)
        shard = shard_of_job(attempt.lease.job.id)
        if attempt.stop_reason is StopReason.YIELDS:
            self.slots.yielded(shard)
        if wait_s is not None:
            self.slots.retry_after(shard, asyncio.get_running_loop().time(), wait_s)
            self._consumers[shard].reschedule()
        self._reconsider()

    def _limit_changed(self) -> None:
        self._reconsider()
        self._membership.notify()

    def _reconsider(self) -> None:
        for consumer in self._consumers:
            consumer.check_for_work()

    def _shard_reachable(self, shard: int, ok: bool) -> None:
        if ok:
            self._unreachable_shards.discard(shard)
        else:
            self._unreachable_shards.add(shard)
        self._set_broker_ok(ok or len(self._unreachable_shards) < len(self._consumers))

    def _set_broker_ok(self, ok: bool) -> None:
        if ok != self.broker_ok:
            self.broker_ok = ok
            self._membership.notify()
