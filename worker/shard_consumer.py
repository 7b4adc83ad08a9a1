"""Consume one shard of the queue: claim jobs whenever a slot is free, and follow the session's control stream there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NoReturn

from queue_schemas import Claimed, Control, ControlKind, Fenced, InferqError, Lease, Pool, SessionId
from telemetry import get_logger
from telemetry.backoff import Backoff

from .attempts import Attempts
from .attempts.adapter_loads import AdapterLoads
from .context import WorkerContext
from .core import Claim, Slots
from .preemption import Preemption
from .queue import Queue

CONTROL_BLOCK_MS = 5_000
_BACKOFF = Backoff(0.1, 2.0)
_RETRY_S = 2.0

log = get_logger(__name__)


class ShardConsumer:
    """Serves ``shard`` for one session; what it claims runs in ``attempts``.

    ``reachable(shard, ok)`` is called whenever the shard's server answers or stays silent; ``answer_ping`` when the
    Manager asks whether this session lives.
    """

    def __init__(
        self,
        shard: int,
        queue: Queue,
        session_id: SessionId,
        slots: Slots,
        attempts: Attempts,
        context: WorkerContext,
        *,
        reachable: Callable[[int, bool], None],
        answer_ping: Callable[[], None],
        preemption: Preemption,
        adapters: AdapterLoads | None = None,
    ) -> None:
        self._shard = shard
        self._queue = queue
        self._session_id = session_id
        self._slots = slots
        self._attempts = attempts
        self._context = context
        self._reachable = reachable
        self._answer_ping = answer_ping
        self._preemption = preemption
        self._adapters = adapters
        self._signal = asyncio.Event()
        self._must_reconcile = False
        """Whether the server was away, and may have lost its latest writes."""

    def check_for_work(self) -> None:
        """Something changed that may allow a claim: a slot is free, the engine is ready, other queues are assigned."""
        if self._signal.is_set():
            return
        if self._must_reconcile or self._slots.has_claim(self._shard, asyncio.get_running_loop().time()):
            self._signal.set()

    def reschedule(self) -> None:
        """When to claim next without another reason has changed."""
        self._signal.set()

    async def run(self, group: asyncio.TaskGroup, *, joined: bool) -> None:
        """Join the shard unless that is done, then claim and listen in tasks of ``group``. Raises ``Fenced``."""
        while not joined:
            await asyncio.sleep(_RETRY_S)
            try:
                await self._queue.workers.join_on(self._shard, self._session_id)
                joined = True
            except Fenced:
                raise
            except InferqError as error:
                log.debug("shard_not_joined", shard=self._shard, error=error.message)
        group.create_task(self._follow_control(group), name=f"control {self._shard}")
        group.create_task(self._claim_jobs(group), name=f"claims {self._shard}")

    async def _claim_jobs(self, group: asyncio.TaskGroup) -> NoReturn:
        """Claim whenever there is a free slot and reason to."""
        shard, signal, slots, now = self._shard, self._signal, self._slots, asyncio.get_running_loop().time
        while True:
            signal.clear()
            # Not while a claim is unanswered: what it gave would be taken back, and its repeat leave us unparked.
            if self._must_reconcile and not slots.is_claiming(shard) and not await self._reconcile_leases():
                continue
            claim = slots.next_claim(shard, now())
            if claim is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(slots.due_at(shard)):
                        await signal.wait()
                continue
            claimed = await self._claim(claim)
            if claimed is not None:
                slots.answered(claim, claimed, now())
                self._preemption.claimed(claim, claimed.leases)
                self._start(claimed.leases, group)

    async def _reconcile_leases(self) -> bool:
        """Tell a server that was away what runs here; whether it answered. Raises ``Fenced``."""
        shard = self._shard
        self._must_reconcile = False
        try:
            not_held = await self._queue.workers.reconcile_leases(
                shard, self._session_id, self._slots.last_seq(shard), self._attempts.leases(shard)
            )
        except Fenced:
            raise
        except InferqError as error:
            log.warning("leases_not_reconciled", shard=shard, error=error.message)
            self._must_reconcile = True
            await asyncio.sleep(_RETRY_S)
            return False
        self._attempts.drop(not_held)
        return True

    async def _claim(self, claim: Claim) -> Claimed | None:
        """Send ``claim``; None if it was not answered and must be sent again. Raises ``Fenced``."""
        region = self._context.settings.region
        try:
            return await self._queue.workers.claim(
                claim.shard, self._session_id, claim.seq, claim.turn, claim.n, claim.pools, region,
                offer=claim.offer, received=claim.received,
                cache=claim.cache, slots=claim.slots, capacity=claim.capacity,
            )  # fmt: skip
        except Fenced:
            raise
        except InferqError as error:
            log.warning("claim_not_answered", shard=claim.shard, error=error.message)
            await asyncio.sleep(_RETRY_S)
            return None

    async def _hand_back(self, lease: Lease) -> None:
        """Give back a job that was handed over when none can be run here any more."""
        try:
            await self._queue.attempts.release(lease, "its worker takes no jobs now", counted=False)
        except InferqError as error:
            log.warning("job_not_handed_back", job_id=lease.job.id, error=error.message)
        finally:
            self._slots.freed()

    def _start(self, leases: Sequence[Lease], group: asyncio.TaskGroup) -> None:
        own = self._context.settings.region
        if self._context.switching is not None or self._adapters is not None:
            # What was on its way when the engine changed its model, or unloaded an adapter.
            for lease in leases:
                if self._lacks(lease.job.model):
                    group.create_task(self._hand_back(lease))
            leases = [lease for lease in leases if not self._lacks(lease.job.model)]
        for job in (lease.job for lease in leases):
            if job.region and job.region != own:
                self._context.metrics.remote(job.model, job.region)
        self._attempts.start(leases, group)

    def _lacks(self, model: Pool) -> bool:
        switching, adapters = self._context.switching, self._adapters
        if switching is not None and model not in switching.models:
            return True
        return adapters is not None and adapters.lacks(model)

    def _take_handed(self, lease: Lease | None, group: asyncio.TaskGroup) -> None:
        """Run a job that was handed over, or give it back if none can be run any more. None: it could not be read, and
        was given back already; it has used up a slot of the offer all the same."""
        can_run = self._slots.handed_over(self._shard)
        if lease is None:
            self._slots.freed()
        elif can_run:
            self._start((lease,), group)
        else:
            group.create_task(self._hand_back(lease))
        self.check_for_work()

    async def _follow_control(self, group: asyncio.TaskGroup) -> NoReturn:
        """Follow the session's control stream. Raises ``Fenced``."""
        shard = self._shard
        after, failures = "0", 0
        while True:
            try:
                messages = await self._queue.workers.read_control(shard, self._session_id, after, CONTROL_BLOCK_MS)
            except Fenced:
                raise
            except InferqError as error:
                if not failures:
                    log.warning("queue_unreachable", shard=shard, error=error.message)
                failures += 1
                self._reachable(shard, False)
                await asyncio.sleep(_BACKOFF.pause_s(failures))
                continue
            self._reachable(shard, True)
            if failures:
                failures = 0
                self._must_reconcile = True
                self._signal.set()
            for message_id, message in messages:
                after = message_id
                if message is not None:
                    self._handle_control(message, group)

    def _handle_control(self, message: Control, group: asyncio.TaskGroup) -> None:
        match message.kind:
            case ControlKind.JOB if message.lease is None or not self._attempts.has(message.lease.attempt_id):
                self._take_handed(message.lease, group)
            case ControlKind.WAKE:
                self._slots.wake(self._shard)
                self._signal.set()
            case ControlKind.ABORT if message.job_id is not None:
                self._attempts.abort(message.job_id, message.reason)
            case ControlKind.YIELD:
                group.create_task(self._preemption.ask(message.attempt_id, self._shard))
            case ControlKind.DRAIN:
                self._context.drain.set()
            case ControlKind.PING:
                self._answer_ping()
