"""One step of one batch: where it stands, what comes next, and what is left for the step after it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import ValidationError

from queue_schemas import BrokerUnavailable, InferqError, Tenant
from storage import Batch, BatchError, BatchStatus, ObjectMissing
from telemetry import get_logger
from telemetry.threads import in_thread

from .context import BatchContext, Folder
from .core import Phase, Work, reply_stream_of
from .dispatcher import BatchDispatcher
from .end_events import batch_ended
from .merge import merge, publish_files
from .rq_jobs import STEP_LIMIT_S, StepQueue
from .settings import BatchSettings
from .validate import validate

ROUND_MS, MIN_STEP_MS = 10_000, 50
"""How long a round of steps, one of each batch that waits, is to take at most, as far as steps of that length allow."""
MAX_FAILURES = 200
"""Steps that fail one after the other for a reason that we do not understand, until the batch is failed."""
_WORDS = {
    Phase.READ: "validate",
    Phase.COMPARE: "validate",
    Phase.PUMP: "pump",
    Phase.MERGE: "finalize",
    Phase.REST: "finalize",
    Phase.END: "finalize",
}

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Next:
    """What follows a step: nothing (``what`` is empty), or another one, after ``pause_s``."""

    what: str = ""
    pause_s: float = 0


class Batcher:
    """Takes batches forward, a step at a time."""

    def __init__(self, context: BatchContext, steps: StepQueue) -> None:
        self._context = context
        self._steps = steps
        self.stalled = ""
        """Why the last step could not be done; empty: it could."""

    async def advance(self, tenant_name: str, batch_id: str) -> str:
        """Do a step, and put the next one on the queue. What was done, for people.

        Raises what is a fault of ours; everything that may pass (the store or the queue is away or full) is waited for.
        """
        tenant, token = Tenant(tenant_name), secrets.token_hex(8)
        if not await in_thread(lambda: self._steps.lock(batch_id, token, self._context.settings.lock_ttl_ms)):
            return "another step of it runs"
        following = Next()
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(STEP_LIMIT_S), self._locked(batch_id, token):
                following = await self._step(tenant, batch_id)
            self.stalled = ""
        except (InferqError, ObjectMissing, TimeoutError) as error:
            following = await self._failed(batch_id, error)
        except Exception as error:
            following = await self._broken(tenant, batch_id, error)
            raise
        finally:
            await self._leave(tenant, batch_id, token, following)
        return f"{following.what or 'ended'} after {time.perf_counter() - begun:.2f} s"

    async def _step(self, tenant: Tenant, batch_id: str) -> Next:
        context = self._context
        batch = await in_thread(lambda: context.batches.get(tenant, batch_id))
        if batch is None:
            return Next()
        folder = Folder(context.store, batch)
        if batch.ended:
            await self._finish(batch, folder)
            return Next()
        work, left = await in_thread(folder.load)
        phase = work.phase
        begun = context.tick_s()
        pause = await self._do(batch, folder, work)
        context.metrics.step(_WORDS[phase], context.tick_s() - begun)
        if work.phase is Phase.END:
            await self._end(batch, folder, work)
            return Next()
        data = work.model_dump_json().encode()
        if data != left:
            await in_thread(lambda: folder.save(data))
        if work.progress != batch.progress:
            await in_thread(lambda: context.batches.advance(tenant, batch_id, work.progress))
        await in_thread(lambda: self._steps.forget([batch_id], "failures"))
        return Next(_describe(work), pause)

    async def _do(self, batch: Batch, folder: Folder, work: Work) -> float:
        """One step's work. The seconds after which to go on."""
        context, settings = self._context, self._context.settings
        others = await in_thread(self._steps.waiting_count)
        until = context.tick_s() + step_limit_ms(settings, others) / 1000
        match work.phase:
            case Phase.READ | Phase.COMPARE:
                return await validate(context, batch, folder, work, until)
            case Phase.PUMP:
                return await BatchDispatcher(context, batch, folder, work).run(until, shared=others > 0)
            case Phase.MERGE | Phase.REST:
                await merge(context, batch, folder, work)
            case Phase.END:
                pass
        return 0

    async def _end(self, batch: Batch, folder: Folder, work: Work) -> None:
        """Write the end. Whoever dies on the way begins here again, with the same."""
        context, request = self._context, batch.request
        status = work.outcome or BatchStatus.COMPLETED
        work.publish(status, errors=tuple(work.errors))
        if status is BatchStatus.CANCELLED and batch.cancel_asked_at is not None:
            work.stamp("cancelling_at", batch.cancel_asked_at)
        work.stamp(f"{status.value}_at", context.now_s())
        await in_thread(lambda: publish_files(context, batch, work))
        tenant = Tenant(request.tenant)
        await in_thread(lambda: context.batches.end(tenant, request.id, work.progress))
        ended = Batch(request, work.progress, batch.cancel_asked_at)
        context.metrics.ended(status.value)
        progress = work.progress
        log.info(
            "batch_ended",
            batch=request.id,
            status=status.value,
            lines=progress.total,
            completed=progress.completed,
            failed=progress.failed,
        )
        await self._finish(ended, folder)

    async def _finish(self, batch: Batch, folder: Folder) -> None:
        """What follows an end that is written. Each of it may be done again."""
        context, request = self._context, batch.request
        tenant = Tenant(request.tenant)
        await in_thread(lambda: batch_ended(context.store, batch))
        if batch.progress.model is not None and context.broker is not None:
            shard = context.broker.shard_of(batch.progress.model)
            try:
                await context.broker.durable_replies.close(shard, reply_stream_of(request.id))
            except BrokerUnavailable as error:
                log.debug("mailbox_left", batch=request.id, error=error.message)  # it expires
        await in_thread(folder.clear)
        await in_thread(lambda: context.batches.retire(tenant, request.id))
        await in_thread(lambda: self._steps.forget([request.id], "failures", "pause"))

    async def _failed(self, batch_id: str, error: Exception) -> Next:
        """A step could not be done now: it is tried again, later and later."""
        code = error.code if isinstance(error, InferqError) else type(error).__name__
        message = error.message if isinstance(error, InferqError) else f"{type(error).__name__}: {error}"
        self.stalled = message
        self._context.metrics.failed(code)
        pause = await self._pause_s(batch_id)
        log.warning("batch_step_failed", batch=batch_id, error=message, again_in_s=round(pause, 2))
        return Next("again", pause)

    async def _broken(self, tenant: Tenant, batch_id: str, error: Exception) -> Next:
        """A step met what it should not have: tried again as well, but not for ever."""
        self.stalled = f"{type(error).__name__}: {error}"
        self._context.metrics.failed("internal_error")
        log.exception("batch_step_broke", batch=batch_id)
        count = await in_thread(lambda: self._steps.count_failure(batch_id))
        if count >= MAX_FAILURES:
            await in_thread(lambda: self._fail(tenant, batch_id, error))
            return Next("ends", 0)
        return Next("again", self._backoff_s(count))

    def _fail(self, tenant: Tenant, batch_id: str, error: Exception) -> None:
        """A batch that nothing takes further ends, with what is known of it; what was stored of it is removed later."""
        batch = self._context.batches.get(tenant, batch_id)
        if batch is None or batch.ended:
            return
        what = "the batch could not be run"
        if isinstance(error, ValidationError):
            what = "the batch's own record cannot be read"
        fault = BatchError(code="internal_error", message=f"{what}; the batcher's log says why under its id")
        stamps = batch.progress.stamps | {"failed_at": int(self._context.now_s())}
        progress = batch.progress.model_copy(
            update={"status": BatchStatus.FAILED, "errors": (*batch.progress.errors, fault), "stamps": stamps}
        )
        self._context.batches.end(tenant, batch_id, progress)

    async def _pause_s(self, batch_id: str) -> float:
        try:
            return self._backoff_s(await in_thread(lambda: self._steps.count_failure(batch_id)))
        except BrokerUnavailable:
            return self._context.settings.max_retry_backoff_ms / 1000

    def _backoff_s(self, failures: int) -> float:
        settings = self._context.settings
        doubled: int = settings.retry_backoff_ms << min(max(failures - 1, 0), 16)
        return min(doubled, settings.max_retry_backoff_ms) / 1000

    async def _leave(self, tenant: Tenant, batch_id: str, token: str, following: Next) -> None:
        """Let go of the batch, and see to its next step; what cannot be done here the sweep does."""
        try:
            if following.pause_s > 0:
                await in_thread(lambda: self._steps.pause(batch_id, int(following.pause_s * 1000)))
            await in_thread(lambda: self._steps.unlock(batch_id, token))
            # Sweeps of two batchers may both have given it a step: of two that follow each other one is enough.
            if following.what and not following.pause_s and batch_id not in await in_thread(self._steps.waiting):
                number = int(self._context.now_s() * 1000)
                await in_thread(lambda: self._steps.put(tenant, batch_id, following.what, number))
        except BrokerUnavailable as error:
            log.warning("next_step_left_to_the_sweep", batch=batch_id, error=error.message)

    @asynccontextmanager
    async def _locked(self, batch_id: str, token: str) -> AsyncIterator[None]:
        """Keep the lock meanwhile."""

        async def keep() -> None:
            ttl_ms = self._context.settings.lock_ttl_ms
            while True:
                await asyncio.sleep(ttl_ms / 3000)
                try:
                    if not await in_thread(lambda: self._steps.renew_lock(batch_id, token, ttl_ms)):
                        log.warning("batch_lock_lost", batch=batch_id)  # two steps of one batch harm nothing
                        return
                except BrokerUnavailable as error:
                    log.debug("batch_lock_not_kept", batch=batch_id, error=error.message)

        task = asyncio.create_task(keep(), name="lock")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def step_limit_ms(settings: BatchSettings, others: int) -> float:
    """How long a step takes while so many wait: a small batch's turn comes soon behind however many large ones."""
    if not others:
        return settings.step_ms
    return min(settings.shared_step_ms, max(MIN_STEP_MS, ROUND_MS / others))


def _describe(work: Work) -> str:
    progress = work.progress
    word = _WORDS[work.phase]
    if work.phase is Phase.PUMP:
        return f"{word} {progress.completed + progress.failed} of {progress.total} lines"
    return word
