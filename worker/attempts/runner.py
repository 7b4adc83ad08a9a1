"""Run one attempt on the engine: send its request, or the one for the rest of a lost stream, and decide how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from openai_api.completions.whole_answer import WholeAnswer, streamed
from openai_api.sse import EVENT_STREAM
from queue_schemas import BadRequest, DeadlineExceeded, EngineFailed, InferqError, Job, Outcome, Pool
from scheduling.cost import OUTPUT_WEIGHT
from telemetry import get_logger, inject

from ..core import Continuation, Retry, RetryLater, judge_answer, judge_failure, judge_server_error
from ..core.slots import RETRY_APART_S
from ..engines import Engine, EngineAnswer, EngineCall, EngineGone, NotContinuable, new_call_id
from ..metrics import WorkerMetrics
from ..queue import Queue
from .answer_relay import AnswerRelay
from .attempt import Attempt, Ending, EngineDisconnected, Release, Settle, StopReason, Yield, log_fields
from .continuation_planner import Continuations, read_delivered

_STREAM_REFUSALS = frozenset({400, 404, 405, 415, 422, 501})
"""Answers of engines that do not stream, or not with these options; and to requests that are wrong by themselves."""

log = get_logger(__name__)


_CHARACTERS_PER_TOKEN = 4
"""Roughly, where no tokenizer can be asked."""
_HANDED_BACK = {
    # A queue that lost its latest writes may have taken the job in once more: it says which it is.
    StopReason.ENDED_BEFORE_START: "already aborted on this worker",
    StopReason.ROUTER_GONE: "nobody waits for the answer",
    StopReason.WORKER_STOPS: "its worker stops",
}
"""Why jobs run again as if never started."""


class _NotStreamed(Exception):
    """The engine refuses a request as it is asked for a stream."""


class AttemptRunner:
    """Runs attempts on ``engine``; :meth:`run` never raises for anything that an engine does.

    ``other_worker_serves(pool)`` says whether another worker serves a model.
    """

    def __init__(
        self,
        engine: Engine,
        queue: Queue,
        relay: AnswerRelay,
        metrics: WorkerMetrics,
        other_worker_serves: Callable[[Pool], Awaitable[bool]],
        *,
        preemption: bool,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._relay = relay
        self._metrics = metrics
        self._other_worker_serves = other_worker_serves
        self._preemption = preemption
        self._continuations = Continuations(engine)

    async def run(self, attempt: Attempt) -> Ending:
        """Call the engine and say how the attempt ends."""
        lease = attempt.lease
        try:
            if attempt.stop_reason is not None:
                return await self._stopped(attempt, attempt.stop_reason)
            return await self._call(attempt)
        except BadRequest as error:
            # The request is at fault: it would be for every engine.
            log.info("request_refused", error=error.message, **log_fields(lease))
            return Settle(Outcome.FAILED, attempt.cutter.fail(error))
        except EngineFailed as error:
            return self._engine_failed(attempt, error)
        except asyncio.CancelledError:
            if attempt.stop_reason is None or attempt.task is None:
                raise
            attempt.task.uncancel()
            return await self._stopped(attempt, attempt.stop_reason)
        except Exception as error:
            log.exception("attempt_crashed", **log_fields(lease))
            return Release(f"the worker failed on it ({type(error).__name__})", counted=True)

    def _engine_failed(self, attempt: Attempt, error: EngineFailed) -> Ending:
        lease = attempt.lease
        log.warning("engine_call_failed", error=error.message, **log_fields(lease))
        if isinstance(error, EngineGone):
            return EngineDisconnected(error.public)
        verdict = judge_failure(attempt.cutter.begun, lease.attempt, lease.job.max_attempts)
        if isinstance(verdict, Outcome) and not lease.job.persisted:
            return Settle(verdict, attempt.cutter.fail(error))
        # A persisted job keeps an engine's answer, not that there was none.
        return Release(error.public, counted=True)

    async def _call(self, attempt: Attempt) -> Ending:
        lease = attempt.lease
        job = lease.job
        if job.persisted and job.stream and lease.epoch > 1:
            try:
                delivered = await read_delivered(self._queue, job, self._relay.max_answer_bytes)
            except InferqError as error:
                return Release(f"its persisted output could not be read: {error.public}", counted=False)
            if delivered.rest is not None:
                return self._complete(attempt, delivered.rest)
            job = replace(job, prefix=delivered.prefix)
        attempt.may_yield = self._preemption and _may_yield(job) and await self._continuations.can_continue(job)
        if not job.stream and (attempt.may_yield or job.prefix):
            return await self._compose(attempt, job)
        return await self._continue(attempt, job) if job.prefix else await self._ask(attempt, job.body, None)

    async def _compose(self, attempt: Attempt, job: Job) -> Ending:
        """Answer a job that is no stream with what the engine streams, or plainly if it does not."""
        try:
            streamed_job = replace(job, body=streamed(job.body))
            if job.prefix:
                return await self._continue(attempt, streamed_job)
            return await self._ask(attempt, streamed_job.body, None, composed=True)
        except _NotStreamed:
            attempt.may_yield = False
            return await self._ask(attempt, job.body, None)

    def _complete(self, attempt: Attempt, rest: bytes) -> Ending:
        """Settle an answer of which only its end (``rest``) was not said."""
        job = attempt.lease.job
        if not job.stream:
            whole = WholeAnswer(job.path, job.prefix)
            whole.add(rest)
            return self._relay.settle_whole(attempt, whole, Outcome.DONE, None)
        attempt.cutter.head(200, EVENT_STREAM, continued=True)
        return Settle(Outcome.DONE, attempt.cutter.feed(rest) + attempt.cutter.end())

    async def _continue(self, attempt: Attempt, job: Job) -> Ending:
        """Answer behind the prefix of ``job``, or from the start if the engine cannot."""
        try:
            continuation = await self._continuations.plan(job)
            self._relay.output_count += 1
            self._metrics.redone(job.model, "prefill", continuation.said_tokens)
            if continuation.body is None:
                return self._complete(attempt, continuation.ending(int(time.time())))
            return await self._ask(attempt, continuation.body, continuation, composed=not job.stream)
        except NotContinuable as error:
            log.warning("stream_restarted", error=f"the engine cannot go on: {error}", **log_fields(attempt.lease))
            self._metrics.redone(job.model, "decode", len(job.prefix) / _CHARACTERS_PER_TOKEN)
            attempt.may_yield = False
            return await self._ask(attempt, job.body, None, composed=not job.stream)

    async def _ask(
        self, attempt: Attempt, body: bytes, continuation: Continuation | None, *, composed: bool = False
    ) -> Ending:
        """Send ``body`` to the engine. Raises ``NotContinuable`` if it refuses to go on. ``composed``: it asks for the
        stream of an answer that is none; raises ``_NotStreamed`` if that may be why it is refused."""
        lease = attempt.lease
        job = lease.job
        trace = inject(job.traceparent)
        call = EngineCall(job.path, body, job.content_type, new_call_id(job.id), trace, job.headers or {})
        async with self._engine.call(call) as answer:
            self._relay.output_count += 1
            if 300 <= answer.status < 400:
                raise EngineFailed(
                    f"the engine answers with a redirect ({answer.status}), which is not followed: give the worker "
                    "the URL that it leads to"
                )
            if composed and continuation is None and answer.status in _STREAM_REFUSALS:
                raise _NotStreamed
            verdict = await self._judge(attempt, answer.status, answer)
            if isinstance(verdict, Release):
                return verdict
            is_stream = answer.content_type.startswith(EVENT_STREAM)
            if continuation is not None and not (is_stream and verdict is Outcome.DONE):
                raise NotContinuable(f"it answers {answer.status}, {answer.content_type}")
            attempt.may_yield = attempt.may_yield and is_stream
            if is_stream and composed:
                whole = await self._relay.whole(attempt, answer, continuation)
                if whole.failure:
                    verdict = await self._judge(attempt, whole.failure[0], answer)
                if isinstance(verdict, Release):
                    return verdict
                return self._relay.settle_whole(attempt, whole, verdict, answer)
            if is_stream:
                return await self._relay.stream(attempt, answer, verdict, continuation)
            return await self._relay.plain(attempt, answer, verdict)

    async def _judge(self, attempt: Attempt, status: int, answer: EngineAnswer) -> Outcome | Release:
        """What becomes of an answer with ``status``."""
        lease = attempt.lease
        verdict = judge_answer(status, lease.attempt, lease.job.max_attempts)
        if verdict is Retry.SPENT:
            decision = await self._server_error(attempt, answer)
            if not isinstance(decision, Outcome):
                wait_s = decision.wait_s if isinstance(decision, RetryLater) else RETRY_APART_S
                return Release(f"the engine answered {status}", counted=True, wait_s=wait_s)
            verdict = decision
        if status >= 500:
            log.warning("engine_error_passed_on", status=status, **log_fields(lease))
        return verdict

    async def _server_error(self, attempt: Attempt, answer: EngineAnswer) -> Outcome | Retry | RetryLater:
        """What becomes of a 5xx answer that is not the last attempt's."""
        job = attempt.lease.job
        return judge_server_error(
            job,
            retry_after_s=answer.retry_after_s,
            remaining_s=attempt.deadline - asyncio.get_running_loop().time(),
            elsewhere=await self._other_worker_serves(job.model),
        )

    async def _stopped(self, attempt: Attempt, reason: StopReason) -> Ending:
        match reason:
            case StopReason.JOB_ENDED:
                self._metrics.ended(attempt.lease.job.model, "aborted")
                return None
            case StopReason.DEADLINE:
                # The queue expires late jobs as well, but only each second.
                error = _deadline_passed("while it ran", attempt.lease.job.deadline_from)
                unsent = await attempt.sender.close() if attempt.sender is not None else b""
                cost = OUTPUT_WEIGHT * attempt.events  # at least
                used = cost if cost > attempt.lease.job.cost_estimate else None
                return Settle(Outcome.EXPIRED, unsent + attempt.cutter.fail(error), used)
            case StopReason.YIELDS:
                return await self._yield(attempt)
            case StopReason.STREAM_STALLED:
                return await self._stalled(attempt)
            case _:
                return Release(_HANDED_BACK[reason], counted=False)

    async def _yield(self, attempt: Attempt) -> Ending:
        """Hand the job back with what it said: in the job, or, of a persisted stream, in its output."""
        lease, reason = attempt.lease, "it yields to an interactive job"
        job = lease.job
        if job.stream:
            unsent = await attempt.sender.close() if attempt.sender is not None else b""
            if unsent:
                try:
                    await self._queue.attempts.append(lease, unsent)
                except InferqError as error:  # it is said once more
                    log.warning("frames_not_appended", error=error.message, **log_fields(lease))
            return Yield(reason)
        text = attempt.whole.text if attempt.whole is not None else None
        # Nobody has seen it: what some chat templates strip off is better said once more.
        prefix = job.prefix if text is None else text.rstrip()
        return Yield(reason, replace(job, prefix=prefix, yields=job.yields - 1))

    async def _stalled(self, attempt: Attempt) -> Ending:
        """The engine forgot the stream: another engine may do better, once; the same one would do the same."""
        lease = attempt.lease
        job = lease.job
        log.warning("stream_stalled", **log_fields(lease))
        sentence = "the engine said nothing more of the answer while it served others"
        if job.persisted or (lease.attempt == 1 and await self._other_worker_serves(job.model)):
            return Release(sentence, counted=True)
        setting = "BUFFERED_STREAM_TIMEOUT_MS" if attempt.buffers else "STREAM_IDLE_TIMEOUT_MS"
        error = EngineFailed(
            f"{sentence}, for as long as its worker waits (INFERQ_WORKER_{setting}); ask for less, or raise that limit"
        )
        unsent = await attempt.sender.close() if attempt.sender is not None else b""
        return Settle(Outcome.FAILED, unsent + attempt.cutter.fail(error))


def _may_yield(job: Job) -> bool:
    """Whether what it says is kept somewhere when it yields: in the job itself, or in its output."""
    return job.yields > 0 and (job.persisted or not job.stream)


def _deadline_passed(where: str, limit: str) -> DeadlineExceeded:
    """``where`` says where the time ran out ("in the queue"); ``limit`` is the job's ``deadline_from``."""
    named = f" of {limit}" if limit else ""
    return DeadlineExceeded(
        f"the request's time{named} ran out {where}; the same request would end the same way: allow it more time "
        "(x-inferq-deadline-ms, or the client's own time-out), or ask for less"
    )
