"""Attempts: the jobs this worker runs now, one task each.

Every attempt ends in exactly one of three ways: settled with an answer, released to be run again, or dropped because
the queue has ended it already.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from broker import Broker
from queue_schemas import (
    BadRequest,
    EngineFailed,
    EngineState,
    InferqError,
    Job,
    JobId,
    Lease,
    Outcome,
    Pool,
    Settled,
    shard_of_job,
)
from queue_schemas.addresses import hide_addresses
from queue_schemas.deadlines import deadline_passed
from telemetry import get_logger, inject, span_from, tracing_enabled

from .continuation_planner import NotContinuable, plan_continuation, read_delivered
from .core import (
    Continuation,
    FrameCutter,
    Retry,
    RetryLater,
    StreamStall,
    is_readable,
    is_whole,
    judge_answer,
    judge_failure,
    judge_server_error,
    may_hold_back,
)
from .core.slots import RETRY_APART_S
from .engines import Engine, EngineAnswer, EngineCall, EngineGone, new_call_id
from .frame_batcher import Channel, FrameBatcher
from .metrics import WorkerMetrics

EVENT_STREAM = "text/event-stream"
_ABORTS_KEPT = 4_096
_SETTLE_PAUSE_S = 1.0
GATHER_S = 0.25
"""How long after one attempt broke off others may, as part of the same crash."""
_T = TypeVar("_T")

log = get_logger(__name__)


class Stop(StrEnum):
    """Why a running attempt is stopped from outside."""

    ENDED = "ended"
    """The queue has ended the job: there is nobody to tell."""
    ENDED_BEFORE = "ended_before"
    """The queue had ended the job before it began here, unless it has lost that since."""
    LATE = "late"
    """Its time ran out."""
    UNHEARD = "unheard"
    """The Router that waited is gone."""
    HANDED_BACK = "handed_back"
    """This worker stops."""
    STUCK = "stuck"
    """The engine forgot it while it served others."""


@dataclass(frozen=True, slots=True)
class IdleLimits:
    """How long a stream may stand still while its engine's others go on: of plain text, and of what engines hold back
    (:mod:`worker.core.stream_stall`)."""

    text_s: float
    held_back_s: float


@dataclass(frozen=True, slots=True)
class _Settle:
    outcome: Outcome
    frames: bytes


@dataclass(frozen=True, slots=True)
class _Release:
    reason: str
    counted: bool
    wait_s: float = RETRY_APART_S
    """If it is counted: when the job may come back here."""


@dataclass(frozen=True, slots=True)
class _BrokeOff:
    """The engine went away with the request."""

    reason: str


_Ending = _Settle | _Release | _BrokeOff | None


class _Attempt:
    __slots__ = ("channel", "cutter", "deadline", "ending", "lease", "may_hold_back", "silence", "stop", "task")

    def __init__(self, lease: Lease, deadline: float) -> None:
        self.lease = lease
        self.deadline = deadline
        self.cutter = FrameCutter(lease)
        self.channel: Channel | None = None
        self.task: asyncio.Task[None] | None = None
        """Set by the task itself: one that is cancelled before its first step would never clean up."""
        self.stop: Stop | None = None
        self.ending = False
        self.silence = StreamStall()
        self.may_hold_back: bool | None = None
        """Whether its engine may be silent for long; None: nobody had to know yet."""

    @property
    def holds_back(self) -> bool:
        """Whether the limit of streams whose engines hold back their words is its own."""
        if self.silence.has_said_little:
            return True
        if self.may_hold_back is None:
            self.may_hold_back = may_hold_back(self.lease.job)
        return self.may_hold_back

    def idle_limit_s(self, limits: IdleLimits) -> float:
        """How long its stream may stand still while others go on."""
        return limits.held_back_s if self.holds_back else limits.text_s


class _Group:
    """Attempts that broke off at about the same time. ``beside``: what ran when the first one did."""

    __slots__ = ("attempts", "beside", "ended")

    def __init__(self, first: _Attempt, beside: Sequence[_Attempt]) -> None:
        self.attempts = [first]
        self.beside = beside
        self.ended = asyncio.Event()

    @property
    def is_whole(self) -> bool:
        """Whether nothing went on that ran beside them."""
        return all(attempt.ending for attempt in self.beside)


class Attempts:
    """Runs leases on ``engine``.

    ``elsewhere(pool)`` says whether another worker serves a model. ``ended(lease, wait_s)`` is called when one is over,
    its slot free again: the job may come back after ``wait_s`` if its attempt was spent here, else that is None.
    """

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        frame_batcher: FrameBatcher,
        metrics: WorkerMetrics,
        *,
        max_answer_bytes: int,
        elsewhere: Callable[[Pool], Awaitable[bool]],
        ended: Callable[[Lease, float | None], None],
    ) -> None:
        self.seen = 0
        """Pieces of output that arrived from the engine so far: while it moves, the engine makes progress."""
        self._seen_before = 0
        self._seen_at = 0.0
        self._engine = engine
        self._broker = broker
        self._frame_batcher = frame_batcher
        self._metrics = metrics
        self._max_answer_bytes = max_answer_bytes
        self._elsewhere = elsewhere
        self._ended = ended
        # By attempt: a job that was released may come back here before the answer to its release was seen.
        self._running: dict[str, _Attempt] = {}
        self._aborted: OrderedDict[JobId, None] = OrderedDict()
        self._broken_off: _Group | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, leases: Sequence[Lease], group: asyncio.TaskGroup) -> None:
        """Run each lease in a task of ``group``."""
        now = asyncio.get_running_loop().time()
        for lease in leases:
            attempt = _Attempt(lease, now + lease.remaining_ms / 1000)
            job = lease.job
            self._metrics.wait(job.model, job.lane.value).observe(lease.waited_ms / 1000)
            self._running[lease.attempt_id] = attempt
            self._idle.clear()
            if job.id in self._aborted:
                del self._aborted[job.id]
                attempt.stop = Stop.ENDED_BEFORE
            group.create_task(self._run(attempt))

    def abort(self, job_id: JobId, reason: str) -> None:
        """The queue has ended ``job_id``: close its engine connection. It may be a job whose claim is on its way."""
        self._aborted[job_id] = None
        if len(self._aborted) > _ABORTS_KEPT:
            self._aborted.popitem(last=False)
        for attempt in list(self._running.values()):
            if attempt.lease.job.id == job_id:
                log.info("job_aborted", reason=reason, **_facts(attempt.lease))
                self._stop(attempt, Stop.ENDED)

    def leases(self, shard: int) -> list[Lease]:
        """What runs of ``shard``."""
        return [one.lease for one in self._running.values() if shard_of_job(one.lease.job.id) == shard]

    def drop(self, attempt_ids: Iterable[str]) -> None:
        """The queue knows nothing of these attempts, or gave their jobs to others: nobody will take their answers."""
        for attempt_id in attempt_ids:
            if (attempt := self._running.get(attempt_id)) is not None:
                log.info("attempt_dropped", reason="the queue does not know it any more", **_facts(attempt.lease))
                self._stop(attempt, Stop.ENDED)

    def stop_late(self, now: float) -> None:
        """Stop every attempt whose deadline has passed."""
        for attempt in list(self._running.values()):
            if now >= attempt.deadline:
                self._stop(attempt, Stop.LATE)

    def stop_stuck(self, now: float, limits: IdleLimits) -> None:
        """Stop each stream that stands still while others go on."""
        if self.seen != self._seen_before:
            self._seen_before, self._seen_at = self.seen, now
        for attempt in list(self._running.values()):
            silence = attempt.silence
            # The second look, with its own limit, comes only where the first has found something.
            if silence.is_stuck(now, self._seen_at, limits.text_s) and silence.is_stuck(
                now, self._seen_at, attempt.idle_limit_s(limits)
            ):
                self._stop(attempt, Stop.STUCK)

    def hand_back(self) -> None:
        """Stop all attempts; their jobs go to other workers as if they had not been started."""
        for attempt in list(self._running.values()):
            self._stop(attempt, Stop.HANDED_BACK)

    async def idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    def _stop(self, attempt: _Attempt, why: Stop) -> None:
        # Once it is ending, the queue's answer to the settle says what became of it.
        if attempt.stop is None and not attempt.ending:
            attempt.stop = why
            if attempt.task is not None:
                attempt.task.cancel()

    async def _run(self, attempt: _Attempt) -> None:
        lease = attempt.lease
        job = lease.job
        attempt.task = asyncio.current_task()
        wait_s: float | None = None
        attributes: dict[str, str | int | float | bool] | None = None
        if tracing_enabled():
            attributes = {"job": job.id, "model": job.model, "attempt": lease.attempt}
        try:
            with span_from(job.traceparent, "attempt", attributes) as span:
                ending = await self._answer(attempt)
                attempt.ending = True
                if isinstance(ending, _Settle):
                    await self._settle(attempt, ending)
                elif isinstance(ending, _BrokeOff):
                    wait_s = RETRY_APART_S
                    span.fail(ending.reason)
                    await self._break_off(attempt, ending)
                elif ending is not None:
                    wait_s = ending.wait_s if ending.counted else None
                    span.fail(ending.reason)
                    await self._release(attempt, ending)
        finally:
            if attempt.channel is not None:
                attempt.channel.discard()
            self._running.pop(lease.attempt_id, None)
            if not self._running:
                self._idle.set()
            self._ended(lease, wait_s)

    async def _answer(self, attempt: _Attempt) -> _Ending:
        """Call the engine and say how the attempt ends."""
        lease = attempt.lease
        try:
            return await self._call(attempt) if attempt.stop is None else await self._stopped(attempt, attempt.stop)
        except BadRequest as error:
            # The request is at fault: it would be for every engine.
            log.info("request_refused", error=error.message, **_facts(lease))
            return _Settle(Outcome.FAILED, attempt.cutter.fail(error))
        except EngineFailed as error:
            return self._engine_failed(attempt, error)
        except asyncio.CancelledError:
            if attempt.stop is None or attempt.task is None:
                raise
            attempt.task.uncancel()
            return await self._stopped(attempt, attempt.stop)
        except Exception as error:
            log.exception("attempt_broke", **_facts(lease))
            return _Release(f"the worker tripped over it ({type(error).__name__})", counted=True)

    def _engine_failed(self, attempt: _Attempt, error: EngineFailed) -> _Ending:
        lease = attempt.lease
        log.warning("engine_call_failed", error=error.message, **_facts(lease))
        if isinstance(error, EngineGone):
            return _BrokeOff(error.public)
        verdict = judge_failure(attempt.cutter.begun, lease.attempt, lease.job.max_attempts)
        if isinstance(verdict, Outcome) and not lease.job.stored:
            return _Settle(verdict, attempt.cutter.fail(error))
        # What is kept for whoever asks again is an engine's answer, not that there was none.
        return _Release(error.public, counted=True)

    async def _call(self, attempt: _Attempt) -> _Ending:
        lease = attempt.lease
        job = lease.job
        if job.stored and job.stream and lease.epoch > 1:
            try:
                delivered = await read_delivered(self._broker, job, self._max_answer_bytes)
            except InferqError as error:
                return _Release(f"what is kept of it could not be read: {error.public}", counted=False)
            if delivered.rest is not None:
                return self._ended_before(attempt, delivered.rest)
            job = replace(job, prefix=delivered.prefix)
        return await self._go_on(attempt, job) if job.prefix else await self._ask(attempt, job.body, None)

    def _ended_before(self, attempt: _Attempt, rest: bytes) -> _Ending:
        """All but the end of the answer was delivered: ``rest``."""
        attempt.cutter.head(200, EVENT_STREAM, continued=True)
        return _Settle(Outcome.DONE, attempt.cutter.feed(rest) + attempt.cutter.end())

    async def _go_on(self, attempt: _Attempt, job: Job) -> _Ending:
        """Answer behind the prefix of ``job``, or anew if the engine cannot."""
        try:
            continuation = await plan_continuation(self._engine, job)
            self.seen += 1
            if continuation.body is None:
                return self._ended_before(attempt, continuation.ending())
            return await self._ask(attempt, continuation.body, continuation)
        except NotContinuable as error:
            log.warning("stream_begins_anew", error=f"the engine cannot go on: {error}", **_facts(attempt.lease))
            return await self._ask(attempt, job.body, None)

    async def _ask(self, attempt: _Attempt, body: bytes, continuation: Continuation | None) -> _Ending:
        """Send ``body`` to the engine. Raises ``NotContinuable`` if it refuses to go on."""
        lease = attempt.lease
        job = lease.job
        trace = inject(job.traceparent)
        call = EngineCall(job.path, body, job.content_type, new_call_id(job.id), trace, job.headers or {})
        async with self._engine.call(call) as answer:
            self.seen += 1
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
                    return _Release(f"the engine answered {answer.status}", counted=True, wait_s=wait_s)
                verdict = decision
            if answer.status >= 500:
                log.warning("engine_error_passed_on", status=answer.status, **_facts(lease))
            is_stream = answer.content_type.startswith(EVENT_STREAM)
            if continuation is not None and not (is_stream and verdict is Outcome.DONE):
                raise NotContinuable(f"it answers {answer.status}, {answer.content_type}")
            if is_stream:
                return await self._stream(attempt, answer, verdict, continuation)
            return await self._plain(attempt, answer, verdict)

    async def _server_error(self, attempt: _Attempt, answer: EngineAnswer) -> Outcome | Retry | RetryLater:
        """What becomes of a 5xx answer that is not the last attempt's."""
        job = attempt.lease.job
        return judge_server_error(
            job,
            retry_after_s=answer.retry_after_s,
            remaining_s=attempt.deadline - asyncio.get_running_loop().time(),
            elsewhere=await self._elsewhere(job.model),
        )

    async def _plain(self, attempt: _Attempt, answer: EngineAnswer, verdict: Outcome) -> _Ending:
        body = await answer.read(self._max_answer_bytes)
        self.seen += 1
        if len(body) > self._max_answer_bytes:
            return _Settle(Outcome.FAILED, attempt.cutter.fail(self._too_large()))
        if not is_whole(answer.status, answer.content_type, body, delimited=answer.delimited):
            raise EngineGone(
                "the engine closed the connection, and nothing proves that its answer is whole: it has neither "
                "content-length nor chunks, and is no complete JSON"
            )
        if not is_readable(answer.status, answer.content_type, body):
            unreadable = EngineFailed(
                f"the engine answered with status {answer.status} and {len(body)} bytes that are no JSON, although "
                "their content type says so: see the engine's log"
            )
            return _Settle(Outcome.FAILED, attempt.cutter.fail(unreadable))
        self._metrics.usage(attempt.lease.job.model, body)
        return _Settle(
            verdict, attempt.cutter.whole(answer.status, answer.content_type, body, _headers(attempt.lease, answer))
        )

    async def _stream(
        self, attempt: _Attempt, answer: EngineAnswer, verdict: Outcome, continuation: Continuation | None
    ) -> _Ending:
        job, cutter = attempt.lease.job, attempt.cutter
        attempt.channel = channel = self._channel(attempt)
        headers = _headers(attempt.lease, answer)
        cutter.head(answer.status, answer.content_type, continued=continuation is not None, headers=headers)
        size = events = 0
        data = b""
        silence = attempt.silence
        silence.reading = True
        async for data in answer.chunks():
            self.seen += 1
            silence.pieces += 1
            silence.reading = False
            size += len(data)
            events += data.count(b"\n\n")
            if size > self._max_answer_bytes:
                return _Settle(Outcome.FAILED, await channel.close() + cutter.fail(self._too_large()))
            urgent = not cutter.begun
            if frame := cutter.feed(data if continuation is None else continuation.feed(data)):
                channel.put(frame, urgent=urgent)
                await channel.sent()
                if urgent and continuation is not None and attempt.lease.suspect:
                    await self._clear(attempt.lease)
            silence.reading = True
        silence.reading = False
        self._metrics.usage(job.model, data, events)
        rest = cutter.feed(continuation.end()) if continuation is not None else b""
        last = cutter.finish(delimited=answer.delimited) if verdict is Outcome.DONE else cutter.end()
        if last is None:
            raise _cut_short(answer.delimited)
        return _Settle(verdict, await channel.close() + rest + last)

    def _channel(self, attempt: _Attempt) -> Channel:
        job = attempt.lease.job
        if job.stored:
            return self._frame_batcher.open_persisted(attempt.lease, lambda: self._stop(attempt, Stop.ENDED))
        return self._frame_batcher.open(shard_of_job(job.id), job.reply_to, lambda: self._stop(attempt, Stop.UNHEARD))

    async def _clear(self, lease: Lease) -> None:
        """What crashed engines before is behind this job now: its worker may hold the next suspect."""
        try:
            await self._broker.clear(lease)
        except InferqError as error:
            log.warning("job_not_cleared", error=error.message, **_facts(lease))

    async def _stopped(self, attempt: _Attempt, why: Stop) -> _Ending:
        match why:
            case Stop.ENDED:
                self._metrics.attempts(attempt.lease.job.model, "aborted").inc()
                return None
            case Stop.ENDED_BEFORE:
                # A queue that lost its latest writes may have taken the job in once more: it says which it is.
                return _Release("it was aborted here before", counted=False)
            case Stop.LATE:
                # The queue expires late jobs as well, but only each second.
                error = deadline_passed("while it ran", attempt.lease.job.deadline_from)
                unsent = await attempt.channel.close() if attempt.channel is not None else b""
                return _Settle(Outcome.EXPIRED, unsent + attempt.cutter.fail(error))
            case Stop.UNHEARD:
                return _Release("nobody waits for the answer", counted=False)
            case Stop.STUCK:
                return await self._stuck(attempt)
            case Stop.HANDED_BACK:
                return _Release("its worker stops", counted=False)

    async def _stuck(self, attempt: _Attempt) -> _Ending:
        """The engine forgot the stream: another engine may do better, once; the same one would do the same."""
        lease = attempt.lease
        job = lease.job
        log.warning("stream_stuck", **_facts(lease))
        sentence = "the engine said nothing more of the answer while it served others"
        if job.stored or (lease.attempt == 1 and await self._elsewhere(job.model)):
            return _Release(sentence, counted=True)
        setting = "STREAM_HELD_BACK_LIMIT_MS" if attempt.holds_back else "STREAM_IDLE_LIMIT_MS"
        error = EngineFailed(
            f"{sentence}, for as long as its worker waits (INFERQ_WORKER_{setting}); ask for less, or raise that limit"
        )
        unsent = await attempt.channel.close() if attempt.channel is not None else b""
        return _Settle(Outcome.FAILED, unsent + attempt.cutter.fail(error))

    async def _settle(self, attempt: _Attempt, ending: _Settle) -> None:
        lease = attempt.lease
        answer = await self._until_answered(
            lambda: self._broker.settle(lease, ending.outcome, ending.frames), "job_not_settled", attempt
        )
        if answer is None:
            return
        self._metrics.settled(answer)
        self._metrics.attempts(lease.job.model, ending.outcome.value).inc()
        if answer is not Settled.OK:
            log.info("answer_dropped", answer=answer.value, **_facts(lease))

    async def _release(self, attempt: _Attempt, ending: _Release) -> None:
        lease = attempt.lease
        avoid_ms = round(ending.wait_s * 1000)
        answer = await self._until_answered(
            lambda: self._broker.release(lease, ending.reason, counted=ending.counted, avoid_ms=avoid_ms),
            "job_not_released",
            attempt,
        )
        if answer is None:
            return
        self._metrics.settled(answer)
        self._metrics.attempts(lease.job.model, "spent" if ending.counted else "handed_back").inc()
        log.info("job_released", reason=ending.reason, counted=ending.counted, answer=answer.value, **_facts(lease))

    async def _break_off(self, attempt: _Attempt, ending: _BrokeOff) -> None:
        """End an attempt whose engine went away: together with all that ran there if it crashed, or alone if it only
        closed this connection."""
        group = self._broken_off
        if group is not None:
            group.attempts.append(attempt)
            await group.ended.wait()
            return
        group = self._broken_off = _Group(attempt, list(self._running.values()))
        await asyncio.sleep(GATHER_S)
        self._broken_off = None
        if self._engine.state is EngineState.READY and not group.is_whole:
            release = _Release(ending.reason, counted=True)
            await asyncio.gather(*(self._release(one, release) for one in group.attempts))
        else:
            await self._crashed(group.attempts, ending.reason)
        group.ended.set()

    async def _crashed(self, attempts: Sequence[_Attempt], reason: str) -> None:
        last = max(attempts, key=lambda attempt: attempt.deadline)
        leases = [attempt.lease for attempt in attempts]
        detail = self._engine.detail
        if detail:
            log.warning("engine_crashed_under_jobs", jobs=len(leases), detail=detail)
            # The reason reaches clients: what the engine wrote last, and where it listens, stays in the log.
            reason = f"{reason}; {hide_addresses(detail.partition('; its last lines')[0])}"
        answers = await self._until_answered(lambda: self._broker.crashed(leases, reason), "crash_not_told", last)
        for lease, answer in zip(leases, answers or (), strict=False):
            self._metrics.settled(answer)
            self._metrics.attempts(lease.job.model, "spent").inc()
            log.info("job_crashed", reason=reason, answer=answer.value, suspect=lease.suspect, **_facts(lease))

    async def _until_answered(self, send: Callable[[], Awaitable[_T]], failure: str, attempt: _Attempt) -> _T | None:
        """Tell the queue how an attempt ended until it answers; None if the job's time ran out before it did.

        An answer is worth more than the time it waits for Redis, and a lease that nobody ends stays with a worker that
        lives and renews it. Repeats are safe: the queue's fence passes only the first.
        """
        while True:
            try:
                answer = await send()
            except InferqError as error:
                log.error(failure, error=error.message, **_facts(attempt.lease))
            else:
                return answer
            if asyncio.get_running_loop().time() >= attempt.deadline:
                return None
            await asyncio.sleep(_SETTLE_PAUSE_S)

    def _too_large(self) -> EngineFailed:
        return EngineFailed(
            f"the engine's answer is larger than the {self._max_answer_bytes} bytes that its worker accepts; "
            "ask for less, or raise INFERQ_WORKER_MAX_ANSWER_BYTES"
        )


def _headers(lease: Lease, answer: EngineAnswer) -> Mapping[str, str]:
    """The headers of ``answer`` that the client is to see. After more than one attempt its own retries would multiply
    the fabric's."""
    if answer.status >= 500 and lease.attempt > 1:
        return {**answer.headers, "x-should-retry": "false"}
    return answer.headers


def _cut_short(delimited: bool) -> EngineFailed:
    """The error for a stream that ended before its end."""
    if delimited:
        return EngineFailed("the engine ended the stream without its end marker, and before all of it was said")
    return EngineGone("the engine closed the connection before the end of the stream")


def _facts(lease: Lease) -> dict[str, str | int]:
    """What every line about a job says. Not bound to its task: that would cost each job what few of them log."""
    job = lease.job
    return {"job_id": job.id, "request_id": job.request_id, "attempt": lease.attempt, "epoch": lease.epoch}
