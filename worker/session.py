"""One session id of a worker: from its registration until it has drained, or was declared dead."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from broker import Broker, BrokerSettings
from queue_schemas import (
    Assignment,
    Claimed,
    Control,
    ControlKind,
    EngineState,
    Fenced,
    InferqError,
    Lease,
    RegistrationAnswer,
    SessionId,
    WorkerStatus,
    shard_of_job,
)
from telemetry import get_logger

from .attempts import Attempts, IdleLimits
from .core import Claim, Liveness, LoopWatchdog, Slots
from .engines import Engine
from .fallback_sweeper import stand_in
from .frame_batcher import FrameBatcher
from .lease_renewals import RENEWALS_PER_LEASE, Renewals
from .manager_client import FabricClient
from .membership import Membership
from .metrics import WorkerMetrics
from .peers import Peers
from .settings import WorkerSettings

CONTROL_BLOCK_MS = 5_000
SWEEP_S = 0.25
LEAVE_LIMIT_S = 5.0
HAND_BACK_LIMIT_S = 5.0
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What outlives an session_id. ``connect`` opens the broker named in a registration's answer, once."""

    settings: WorkerSettings
    engine: Engine
    client: FabricClient
    metrics: WorkerMetrics
    url: str | None
    connect: Callable[[RegistrationAnswer], Awaitable[Broker]]
    drain: asyncio.Event
    """Set once: claim no more, finish, end."""
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once: while draining, wait for no running job."""


class WorkerSession:
    """Registers, pulls, runs and answers as ``session_id``."""

    def __init__(self, around: WorkerContext, session_id: SessionId) -> None:
        settings = around.settings
        self.session_id = session_id
        self.slots = Slots(settings.slots)
        self.broker_ok = False
        self._around = around
        self._membership = Membership(
            around.client,
            settings.name,
            url=around.url,
            region=settings.region,
            metrics=around.metrics,
            status=self.status,
            assigned=self._assigned,
            drain=around.drain.set,
        )
        self._liveness = Liveness(settings.engine_stall_limit_ms / 1000)
        self._signals: list[asyncio.Event] = []
        self._unsure: set[int] = set()
        """Shards whose server was away, and may have lost its latest writes."""
        self._away: set[int] = set()
        """Shards whose server does not answer now."""
        self._watchdog = LoopWatchdog(time.monotonic(), settings.loop_stall_limit_ms / 1000)
        self._renewals: Renewals | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._broker: Broker | None = None
        self._attempts: Attempts | None = None

    @property
    def trouble(self) -> list[str]:
        """Why it cannot run jobs now, in sentences."""
        engine = self._around.engine
        reasons = []
        if self._around.drain.is_set():
            reasons.append("the worker is draining")
        if engine.state is not EngineState.READY:
            reasons.append(f"the engine is {engine.state.value}: {engine.detail}")
        if self._membership.trouble:
            reasons.append(self._membership.trouble)
        if not self.broker_ok:
            reasons.append("the queue's Redis is not reached")
        return reasons

    def status(self) -> WorkerStatus:
        """What this worker says of itself."""
        engine = self._around.engine
        return WorkerStatus(
            session_id=self.session_id,
            models=list(engine.models),
            cards=dict(engine.cards),
            slots=self._around.settings.slots,
            running=self.slots.busy,
            engine=engine.state,
            engine_detail=engine.detail[:2_000],
            broker_ok=self.broker_ok,
            draining=self._around.drain.is_set(),
            term=max(self.slots.order[0], 0),
        )

    def engine_changed(self) -> None:
        """The engine's state or models are others now."""
        self.slots.ready = self._around.engine.state is EngineState.READY
        self._signal_all()
        self._membership.tell()

    async def run(self, *, first: bool) -> None:
        """Live until drained. Raises ``Fenced`` when declared dead, within an exception group, as all errors."""
        async with asyncio.TaskGroup() as group:
            working = group.create_task(self._work(first), name="worker")
            await self._around.drain.wait()
            await self._finish()
            working.cancel()

    async def _work(self, first: bool) -> None:
        answer = await self._membership.register(first=first)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._membership.run(), name="heartbeats")
            group.create_task(self._membership.stay_present(self.session_id), name="presence")
            broker = await self._around.connect(answer)
            unjoined = await self._join(broker)
            frame_batcher = FrameBatcher(
                broker.publish,
                broker.append,
                interval_ms=self._around.settings.flush_interval_ms,
                limit_bytes=self._around.settings.frame_buffer_bytes,
            )
            attempts = Attempts(
                self._around.engine,
                broker,
                frame_batcher,
                self._around.metrics,
                max_answer_bytes=self._around.settings.max_answer_bytes,
                elsewhere=Peers(broker, self.session_id).serve,
                ended=self._ended,
            )
            self._signals = [asyncio.Event() for _ in range(broker.shards)]
            self._broker, self._attempts = broker, attempts
            group.create_task(frame_batcher.run(), name="frame_batcher")
            lease_s = answer.lease_ms / 1000
            self._watchdog.ticked_at = time.monotonic()
            self._renewals = Renewals(broker.renewer_apart(), self.session_id, self._watchdog, lease_s)
            self._renewing = group.create_task(self._renewals.run(), name="renewals")
            group.create_task(self._watch_engine(attempts, lease_s), name="engine's progress")
            group.create_task(self._sweep(attempts), name="sweep")
            sweeps = stand_in(broker, self.session_id, self._around.metrics, lease_s)
            group.create_task(sweeps, name="standing in")
            for shard in range(broker.shards):
                serving = self._serve(shard, broker, attempts, group, joined=shard not in unjoined)
                group.create_task(serving, name=f"shard {shard}")
            self.engine_changed()

    async def _serve(
        self, shard: int, broker: Broker, attempts: Attempts, group: asyncio.TaskGroup, *, joined: bool
    ) -> None:
        """Listen and claim on one shard, once it is joined. Raises ``Fenced``."""
        while not joined:
            await asyncio.sleep(_MAX_PAUSE_S)
            try:
                await broker.join_on(shard, self.session_id)
                joined = True
            except Fenced:
                raise
            except InferqError as error:
                log.debug("shard_not_joined", shard=shard, error=error.message)
        group.create_task(self._listen(shard, broker, attempts), name=f"control {shard}")
        group.create_task(self._pull(shard, broker, attempts, group), name=f"claims {shard}")

    async def _join(self, broker: Broker) -> set[int]:
        """Join every shard that answers, at least one; those that did not."""
        while True:
            try:
                unjoined = await broker.join(self.session_id)
            except Fenced:
                raise
            except InferqError as error:
                # Here and below: whatever Redis says short of a verdict on this session id, it may say otherwise soon.
                log.warning("queue_not_joined", error=error.message)
                await asyncio.sleep(_MAX_PAUSE_S)
            else:
                if unjoined:
                    log.warning("shards_not_joined", shards=sorted(unjoined), then="they are joined when they answer")
                self._reached(True)
                return unjoined

    async def _pull(self, shard: int, broker: Broker, attempts: Attempts, group: asyncio.TaskGroup) -> NoReturn:
        """Claim on one shard whenever there is a free slot and reason to."""
        signal, slots, now = self._signals[shard], self.slots, asyncio.get_running_loop().time
        while True:
            signal.clear()
            # Not while a claim is unanswered: what it gave would be taken back, and its repeat leave us unparked.
            if shard in self._unsure and not slots.is_claiming(shard) and not await self._hold(shard, broker, attempts):
                continue
            claim = slots.next_claim(shard, now())
            if claim is None:
                # To the millisecond: somebody's patience with another region's workers is over then.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(slots.due_at(shard)):
                        await signal.wait()
                continue
            claimed = await self._claim(claim, broker)
            if claimed is not None:
                slots.answered(claim, len(claimed.leases), now(), claimed.look_again_ms)
                self._count_abroad(claimed.leases)
                attempts.start(claimed.leases, group)

    async def _hold(self, shard: int, broker: Broker, attempts: Attempts) -> bool:
        """Between claims: tell a server that was away what runs here; whether it answered. Raises ``Fenced``."""
        self._unsure.discard(shard)
        try:
            not_held = await broker.hold(shard, self.session_id, self.slots.last_seq(shard), attempts.leases(shard))
        except Fenced:
            raise
        except InferqError as error:
            log.warning("leases_not_compared", shard=shard, error=error.message)
            self._unsure.add(shard)
            await asyncio.sleep(_MAX_PAUSE_S)
            return False
        attempts.drop(not_held)
        return True

    async def _claim(self, claim: Claim, broker: Broker) -> Claimed | None:
        """Send ``claim``; None if it was not answered and must be sent again. Raises ``Fenced``."""
        region = self._around.settings.region
        try:
            return await broker.claim(claim.shard, self.session_id, claim.seq, claim.turn, claim.n, claim.pools, region)
        except Fenced:
            raise
        except InferqError as error:
            log.warning("claim_not_answered", shard=claim.shard, error=error.message)
            await asyncio.sleep(_MAX_PAUSE_S)
            return None

    def _count_abroad(self, leases: Sequence[Lease]) -> None:
        for job in (lease.job for lease in leases):
            if job.region and job.region != self._around.settings.region:
                self._around.metrics.remote(job.model, job.region).inc()

    async def _listen(self, shard: int, broker: Broker, attempts: Attempts) -> NoReturn:
        """Follow this session_id's control stream on one shard."""
        after, pause = "0", _FIRST_PAUSE_S
        away = False
        while True:
            try:
                messages = await broker.read_control(shard, self.session_id, after, CONTROL_BLOCK_MS)
            except Fenced:
                raise
            except InferqError as error:
                if shard not in self._away:
                    log.warning("queue_not_reached", shard=shard, error=error.message)
                self._away.add(shard)
                self._reached(len(self._away) < broker.shards)
                away = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MAX_PAUSE_S)
                continue
            pause = _FIRST_PAUSE_S
            self._away.discard(shard)
            self._reached(True)
            if away:
                away = False
                self._unsure.add(shard)
                self._signals[shard].set()
            for message_id, message in messages:
                after = message_id
                if message is not None:
                    self._obey(shard, message, attempts)

    def _obey(self, shard: int, message: Control, attempts: Attempts) -> None:
        match message.kind:
            case ControlKind.WAKE:
                self.slots.wake(shard)
                self._signals[shard].set()
            case ControlKind.ABORT if message.job_id is not None:
                attempts.abort(message.job_id, message.reason)
            case ControlKind.DRAIN:
                self._around.drain.set()
            case ControlKind.PING if self._renewals is not None:
                self._renewals.answer_ping()

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
        if self._liveness.moved(len(attempts), attempts.seen, now()):
            return True
        return self._liveness.believes(await self._around.engine.progress(), now())

    async def _sweep(self, attempts: Attempts) -> NoReturn:
        """What is due by time, for all jobs at once; and that this loop turns."""
        now = asyncio.get_running_loop().time
        settings = self._around.settings
        limits = IdleLimits(settings.stream_idle_limit_ms / 1000, settings.stream_held_back_limit_ms / 1000)
        while True:
            await asyncio.sleep(SWEEP_S)
            self._watchdog.ticked_at = time.monotonic()
            attempts.stop_late(now())
            attempts.stop_stuck(now(), limits)
            for shard in self.slots.shards_due(now()):
                self._signals[shard].set()

    async def _finish(self) -> None:
        """Claim no more, let running jobs end, hand the rest back, leave."""
        limit_s = self._around.settings.drain_limit_ms / 1000
        self.slots.draining = True
        self._signal_all()
        self._membership.tell()
        attempts, broker = self._attempts, self._broker
        if attempts is not None and broker is not None:
            log.info("draining", running=len(attempts), limit_s=limit_s)
            if not await _within(_first(attempts.idle(), self._around.hurry.wait()), limit_s) or len(attempts):
                log.warning("jobs_handed_back", jobs=len(attempts))
                attempts.hand_back()
                await _within(attempts.idle(), HAND_BACK_LIMIT_S)
            if self._renewing is not None:
                self._renewing.cancel()  # nothing is held any more, and who has left is told that it is dead
            await _within(self._leave(broker), LEAVE_LIMIT_S)
        if self._membership.registered:
            await _within(self._deregister(), LEAVE_LIMIT_S)

    async def _leave(self, broker: Broker) -> None:
        try:
            await broker.leave(self.session_id)
        except InferqError as error:
            log.warning("queue_not_left", error=error.message)

    async def _deregister(self) -> None:
        try:
            await self._around.client.deregister(self._around.settings.name, self.session_id)
        except InferqError as error:
            log.warning("not_deregistered", error=error.message)

    def _assigned(self, assignment: Assignment, *, registered: bool) -> None:
        if assignment.order == self.slots.order and not registered:
            return  # as nearly every heartbeat says
        if self.slots.assign(assignment, registered=registered):
            log.info("assigned", version=assignment.version, pools=[part.pool for part in assignment.pools])
            self._signal_all()

    def _ended(self, lease: Lease, wait_s: float | None) -> None:
        self.slots.freed()
        if wait_s is not None:
            self.slots.retry_after(shard_of_job(lease.job.id), asyncio.get_running_loop().time(), wait_s)
        self._signal_all()

    def _signal_all(self) -> None:
        for signal in self._signals:
            signal.set()

    def _reached(self, ok: bool) -> None:
        if ok != self.broker_ok:
            self.broker_ok = ok
            self._membership.tell()


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Until one of ``works`` is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _within(work: Awaitable[None], limit_s: float) -> bool:
    """Whether ``work`` was done within the limit; what was not is cancelled."""
    try:
        async with asyncio.timeout(limit_s):
            await work
    except TimeoutError:
        return False
    return True


def broker_settings(settings: WorkerSettings, answer: RegistrationAnswer) -> BrokerSettings:
    """How to reach the queue: as the Manager says, or as this worker was told."""
    return BrokerSettings.load(redis_url=settings.redis_url or answer.broker_url, shards=answer.shards)
