"""Run one attempt on the engine: send its request, or the one for the rest of a lost stream, and decide how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from broker import Broker
from openai_api.sse import EVENT_STREAM
from queue_schemas import BadRequest, EngineFailed, InferqError, Job, Outcome, Pool
from queue_schemas.errors import deadline_passed
from telemetry import get_logger, inject

from ..core import Continuation, Retry, RetryLater, judge_answer, judge_failure, judge_server_error
from ..core.slots import RETRY_APART_S
from ..engines import Engine, EngineAnswer, EngineCall, EngineGone, new_call_id
from ..metrics import WorkerMetrics
from .answer_relay import AnswerRelay
from .attempt import Attempt, Ending, EngineDisconnected, Release, Settle, StopReason, log_fields
from .continuation_planner import NotContinuable, plan_continuation, read_delivered

log = get_logger(__name__)


class AttemptRunner:
    """Runs attempts on ``engine``; :meth:`run` never raises for anything that an engine does.

    ``other_worker_serves(pool)`` says whether another worker serves a model.
    """

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        relay: AnswerRelay,
        metrics: WorkerMetrics,
        other_worker_serves: Callable[[Pool], Awaitable[bool]],
    ) -> None:
        self._engine = engine
        self._broker = broker
        self._relay = relay
        self._metrics = metrics
        self._other_worker_serves = other_worker_serves

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
                delivered = await read_delivered(self._broker, job, self._relay.max_answer_bytes)
            except InferqError as error:
                return Release(f"its persisted output could not be read: {error.public}", counted=False)
            if delivered.rest is not None:
                return self._complete(attempt, delivered.rest)
            job = replace(job, prefix=delivered.prefix)
        return await self._continue(attempt, job) if job.prefix else await self._ask(attempt, job.body, None)

    def _complete(self, attempt: Attempt, rest: bytes) -> Ending:
        """Settle a stream of which only its end (``rest``) was not delivered."""
        attempt.cutter.head(200, EVENT_STREAM, continued=True)
        return Settle(Outcome.DONE, attempt.cutter.feed(rest) + attempt.cutter.end())

    async def _continue(self, attempt: Attempt, job: Job) -> Ending:
        """Answer behind the prefix of ``job``, or from the start if the engine cannot."""
        try:
            continuation = await plan_continuation(self._engine, job)
            self._relay.output_count += 1
            if continuation.body is None:
                return self._complete(attempt, continuation.ending())
            return await self._ask(attempt, continuation.body, continuation)
        except NotContinuable as error:
            log.warning("stream_restarted", error=f"the engine cannot go on: {error}", **log_fields(attempt.lease))
            return await self._ask(attempt, job.body, None)

    async def _ask(self, attempt: Attempt, body: bytes, continuation: Continuation | None) -> Ending:
        """Send ``body`` to the engine. Raises ``NotContinuable`` if it refuses to go on."""
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
            verdict = judge_answer(answer.status, lease.attempt, job.max_attempts)
            if verdict is Retry.SPENT:
                decision = await self._server_error(attempt, answer)
                if not isinstance(decision, Outcome):
                    wait_s = decision.wait_s if isinstance(decision, RetryLater) else RETRY_APART_S
                    return Release(f"the engine answered {answer.status}", counted=True, wait_s=wait_s)
                verdict = decision
            if answer.status >= 500:
                log.warning("engine_error_passed_on", status=answer.status, **log_fields(lease))
            is_stream = answer.content_type.startswith(EVENT_STREAM)
            if continuation is not None and not (is_stream and verdict is Outcome.DONE):
                raise NotContinuable(f"it answers {answer.status}, {answer.content_type}")
            if is_stream:
                return await self._relay.stream(attempt, answer, verdict, continuation)
            return await self._relay.plain(attempt, answer, verdict)

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
                self._metrics.attempts(attempt.lease.job.model, "aborted").inc()
                return None
            case StopReason.ENDED_BEFORE_START:
                # A queue that lost its latest writes may have taken the job in once more: it says which it is.
                return Release("already aborted on this worker", counted=False)
            case StopReason.DEADLINE:
                # The queue expires late jobs as well, but only each second.
                error = deadline_passed("while it ran", attempt.lease.job.deadline_from)
                unsent = await attempt.sender.close() if attempt.sender is not None else b""
                return Settle(Outcome.EXPIRED, unsent + attempt.cutter.fail(error))
            case StopReason.ROUTER_GONE:
                return Release("nobody waits for the answer", counted=False)
            case StopReason.STREAM_STALLED:
                return await self._stalled(attempt)
            case StopReason.WORKER_STOPS:
                return Release("its worker stops", counted=False)

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
