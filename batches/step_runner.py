"""Run one step of one batch, save its checkpoint and put the batch's next step on the queue; for RQ's jobs."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import ValidationError

from queue_schemas import BrokerUnavailable, InferqError, Tenant
from scheduling.batch_urgency import HURRIED_LOAD, need_of
from storage import Batch, BatchError, BatchStatus, ObjectMissing
from telemetry import get_logger
from telemetry.backoff import Backoff
from telemetry.threads import in_thread

from .batch_events import emit_batch_ended
from .context import BatchContext
from .core import Checkpoint, Phase, reply_stream_of
from .rq_jobs import FAILURES, PAUSE, STEP_LIMIT_S, StepQueue
from .settings import BatchSettings
from .steps.dispatcher import BatchDispatcher
from .steps.merge import merge, publish_files
from .steps.run_folder import RunFolder
from .steps.validate import validate

ROUND_MS, MIN_STEP_MS = 10_000, 50
"""How long one step of every waiting batch may take in total, unless the minimum length of a step makes it more."""
MAX_FAILURES = 200
"""Unexpected failures of steps in a row before the batch fails."""
_PHASE_NAMES = {
    Phase.READ: "validate",
    Phase.COMPARE_IDS: "validate",
    Phase.DISPATCH: "dispatch",
    Phase.MERGE: "finalize",
    Phase.UNANSWERED: "finalize",
    Phase.END: "finalize",
}

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NextStep:
    """What follows a step: nothing (``what`` is empty), or another step after ``pause_s``."""

    what: str = ""
    pause_s: float = 0


class StepRunner:
    """Runs steps of any batch."""

    def __init__(self, context: BatchContext, steps: StepQueue) -> None:
        self._context = context
        self._steps = steps
        settings = context.settings
        self._backoff = Backoff(settings.retry_backoff_ms / 1000, settings.max_retry_backoff_ms / 1000)
        self.fault = ""
        """Why the last step failed; empty if it succeeded."""

    async def advance(self, tenant_name: str, batch_id: str) -> str:
        """Run a step and enqueue the next one; what it did, for people.

        Retries while the store or the queue is unavailable or full. Raises unexpected errors, after noting them.
        """
        tenant, token = Tenant(tenant_name), secrets.token_hex(8)
        if not await in_thread(lambda: self._steps.lock(batch_id, token, self._context.settings.lock_ttl_ms)):
            return "another step of it runs"
        next_step = NextStep()
        began = time.perf_counter()
        try:
            async with asyncio.timeout(STEP_LIMIT_S), self._locked(batch_id, token):
                next_step = await self._step(tenant, batch_id)
            self.fault = ""
        except (InferqError, ObjectMissing, TimeoutError) as error:
            next_step = await self._retry(batch_id, error)
        except Exception as error:
            next_step = await self._note_crash(tenant, batch_id, error)
            raise
        finally:
            await self._finish_step(tenant, batch_id, token, next_step)
        return f"{next_step.what or 'ended'} after {time.perf_counter() - began:.2f} s"

    async def _step(self, tenant: Tenant, batch_id: str) -> NextStep:
        context = self._context
        batch = await in_thread(lambda: context.batches.get(tenant, batch_id))
        if batch is None:
            return NextStep()
        folder = RunFolder(context.store, batch)
        if batch.ended:
            await self._clean_up(batch, folder)
            return NextStep()
        checkpoint, saved = await in_thread(folder.load)
        phase = checkpoint.phase
        began = context.tick_s()
        pause = await self._run_phase(batch, folder, checkpoint)
        context.metrics.step(_PHASE_NAMES[phase], context.tick_s() - began)
        if checkpoint.phase is Phase.END:
            await self._end(batch, folder, checkpoint)
            return NextStep()
        data = checkpoint.model_dump_json().encode()
        if data != saved:
            await in_thread(lambda: folder.save(data))
        if checkpoint.progress != batch.progress:
            await in_thread(lambda: context.batches.set_progress(tenant, batch_id, checkpoint.progress))
        await in_thread(lambda: self._steps.forget([batch_id], FAILURES))
        return NextStep(_describe(checkpoint), pause)

    async def _run_phase(self, batch: Batch, folder: RunFolder, checkpoint: Checkpoint) -> float:
        """The work of one step; the seconds to wait before the next one."""
        context, settings = self._context, self._context.settings
        others = await in_thread(self._steps.waiting_count)
        until = context.tick_s() + step_limit_ms(settings, others) / 1000
        match checkpoint.phase:
            case Phase.READ | Phase.COMPARE_IDS:
                return await validate(context, batch, folder, checkpoint, until)
            case Phase.DISPATCH:
                return await self._dispatch(batch, folder, checkpoint, until, shared=others > 0)
            case Phase.MERGE | Phase.UNANSWERED:
                await merge(context, batch, folder, checkpoint)
            case Phase.END:
                pass
        return 0

    async def _dispatch(
        self, batch: Batch, folder: RunFolder, checkpoint: Checkpoint, until: float, *, shared: bool
    ) -> float:
        """A step of dispatching, beside what other batches of the model need; and tell them what this one needs."""
        context, steps, request = self._context, self._steps, batch.request
        model = checkpoint.progress.model or ""
        needs = await in_thread(lambda: steps.other_needs(model, request.id, context.now_s()))
        try:
            return await BatchDispatcher(context, batch, folder, checkpoint, needs).run(until, shared=shared)
        finally:
            now_s, is_over = context.now_s(), checkpoint.phase is not Phase.DISPATCH
            deadline_s, remaining = request.expires_at, checkpoint.remaining
            need = need_of(checkpoint.urgency, remaining=remaining, deadline_s=deadline_s, now_s=now_s)
            if need is not None and (is_over or need.load < HURRIED_LOAD):
                need = None
            await in_thread(lambda: steps.tell_need(model, request.id, need, now_s))

    async def _end(self, batch: Batch, folder: RunFolder, checkpoint: Checkpoint) -> None:
        """Publish the files and the end of a batch. After a crash, the next step does it again with the same result."""
        context, request = self._context, batch.request
        status = checkpoint.outcome or BatchStatus.COMPLETED
        checkpoint.publish(status, errors=tuple(checkpoint.errors))
        if status is BatchStatus.CANCELLED and batch.cancel_asked_at is not None:
            checkpoint.stamp("cancelling_at", batch.cancel_asked_at)
        checkpoint.stamp(f"{status.value}_at", context.now_s())
        await in_thread(lambda: publish_files(context, batch, checkpoint))
        progress = checkpoint.progress
        await in_thread(lambda: context.batches.end(Tenant(request.tenant), request.id, progress))
        context.metrics.ended(status.value)
        log.info(
            "batch_ended",
            batch=request.id,
            status=status.value,
            lines=progress.total,
            completed=progress.completed,
            failed=progress.failed,
        )
        await self._clean_up(Batch(request, progress, batch.cancel_asked_at), folder)

    async def _clean_up(self, batch: Batch, folder: RunFolder) -> None:
        """What follows the end of a batch. Each part may be done again."""
        context, request = self._context, batch.request
        await in_thread(lambda: emit_batch_ended(context.store, batch))
        if batch.progress.model is not None and context.broker is not None:
            shard = context.broker.shard_of(batch.progress.model)
            try:
                await context.broker.durable_replies.close(shard, reply_stream_of(request.id))
            except BrokerUnavailable as error:
                log.debug("reply_stream_not_removed", batch=request.id, error=error.message)  # it expires
        await in_thread(folder.clear)
        await in_thread(lambda: context.batches.unmark(Tenant(request.tenant), request.id))
        await in_thread(lambda: self._steps.forget([request.id], FAILURES, PAUSE))

    async def _retry(self, batch_id: str, error: Exception) -> NextStep:
        """A step failed for a reason that may pass: it is tried again, at growing intervals."""
        code = error.code if isinstance(error, InferqError) else type(error).__name__
        message = error.message if isinstance(error, InferqError) else f"{type(error).__name__}: {error}"
        self.fault = message
        self._context.metrics.failed(code)
        try:
            pause_s = self._backoff.pause_s(await in_thread(lambda: self._steps.count_failure(batch_id)))
        except BrokerUnavailable:
            pause_s = self._context.settings.max_retry_backoff_ms / 1000
        log.warning("batch_step_failed", batch=batch_id, error=message, retry_in_s=round(pause_s, 2))
        return NextStep("retry", pause_s)

    async def _note_crash(self, tenant: Tenant, batch_id: str, error: Exception) -> NextStep:
        """A step failed unexpectedly: it is tried again ``MAX_FAILURES`` times, then the batch fails."""
        self.fault = f"{type(error).__name__}: {error}"
        self._context.metrics.failed("internal_error")
        log.exception("batch_step_crashed", batch=batch_id)
        failures = await in_thread(lambda: self._steps.count_failure(batch_id))
        if failures >= MAX_FAILURES:
            await in_thread(lambda: self._fail(tenant, batch_id, error))
            return NextStep("end", 0)
        return NextStep("retry", self._backoff.pause_s(failures))

    def _fail(self, tenant: Tenant, batch_id: str, error: Exception) -> None:
        """End a batch that cannot go on, with the progress that is known. Its stored objects are removed later."""
        batch = self._context.batches.get(tenant, batch_id)
        if batch is None or batch.ended:
            return
        what = "the batch could not be run"
        if isinstance(error, ValidationError):
            what = "the batch's own record cannot be read"
        failure = BatchError(code="internal_error", message=f"{what}; the batcher's log has the reason under its id")
        stamps = batch.progress.stamps | {"failed_at": int(self._context.now_s())}
        progress = batch.progress.model_copy(
            update={"status": BatchStatus.FAILED, "errors": (*batch.progress.errors, failure), "stamps": stamps}
        )
        self._context.batches.end(tenant, batch_id, progress)

    async def _finish_step(self, tenant: Tenant, batch_id: str, token: str, next_step: NextStep) -> None:
        """Unlock the batch and enqueue its next step; the sweep does what fails here."""
        try:
            if next_step.pause_s > 0:
                await in_thread(lambda: self._steps.pause(batch_id, int(next_step.pause_s * 1000)))
            await in_thread(lambda: self._steps.unlock(batch_id, token))
            # Sweeps of two batchers may both have enqueued a step: two that follow each other need one successor.
            if next_step.what and not next_step.pause_s and batch_id not in await in_thread(self._steps.waiting):
                number = int(self._context.now_s() * 1000)
                await in_thread(lambda: self._steps.put(tenant, batch_id, next_step.what, number))
        except BrokerUnavailable as error:
            log.warning("next_step_left_to_sweep", batch=batch_id, error=error.message)

    @asynccontextmanager
    async def _locked(self, batch_id: str, token: str) -> AsyncIterator[None]:
        """Renew the batch's lock meanwhile."""

        async def renew() -> None:
            ttl_ms = self._context.settings.lock_ttl_ms
            while True:
                await asyncio.sleep(ttl_ms / 3000)
                try:
                    if not await in_thread(lambda: self._steps.renew_lock(batch_id, token, ttl_ms)):
                        log.warning("batch_lock_lost", batch=batch_id)  # two steps of one batch do no harm
                        return
                except BrokerUnavailable as error:
                    log.debug("batch_lock_not_renewed", batch=batch_id, error=error.message)

        task = asyncio.create_task(renew(), name="lock")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def step_limit_ms(settings: BatchSettings, others: int) -> float:
    """How long a step takes while ``others`` wait: small batches come soon however many large ones there are."""
    if not others:
        return settings.step_ms
    return min(settings.shared_step_ms, max(MIN_STEP_MS, ROUND_MS / others))


def _describe(checkpoint: Checkpoint) -> str:
    progress = checkpoint.progress
    name = _PHASE_NAMES[checkpoint.phase]
    if checkpoint.phase is Phase.DISPATCH:
        return f"{name} {progress.completed + progress.failed} of {progress.total} lines"
    return name
