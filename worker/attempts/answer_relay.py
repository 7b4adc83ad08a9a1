"""Relay an engine's answer to the Router that waits or to the job's output, and say how the attempt ends with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

from openai_api.completions.whole_answer import WholeAnswer
from queue_schemas import EngineFailed, InferqError, Job, Lease, Outcome, shard_of_job
from telemetry import get_logger

from ..core import Continuation, is_complete, is_readable, read_usage
from ..engines import EngineAnswer, EngineGone, StepReader
from ..frame_batcher import FrameBatcher, FrameSender
from ..metrics import WorkerMetrics
from ..queue import Queue
from .attempt import Attempt, Ending, Settle, StopReason, log_fields

log = get_logger(__name__)


class AnswerRelay:
    """Reads answers, plain and streamed, of at most ``max_answer_bytes``."""

    def __init__(
        self,
        queue: Queue,
        frame_batcher: FrameBatcher,
        step_reader: StepReader,
        metrics: WorkerMetrics,
        max_answer_bytes: int,
    ) -> None:
        self.output_count = 0
        """Pieces of output that arrived from the engine so far."""
        self.max_answer_bytes = max_answer_bytes
        self._queue = queue
        self._frame_batcher = frame_batcher
        self._step_reader = step_reader
        self._metrics = metrics

    async def plain(self, attempt: Attempt, answer: EngineAnswer, verdict: Outcome) -> Ending:
        """An answer that is no stream. Raises ``EngineGone`` if nothing proves that it is whole."""
        body = await answer.read(self.max_answer_bytes)
        self.output_count += 1
        if len(body) > self.max_answer_bytes:
            return Settle(Outcome.FAILED, attempt.cutter.fail(self._too_large()))
        if not is_complete(answer.status, answer.content_type, body, delimited=answer.delimited):
            raise EngineGone(
                "the engine closed the connection, and nothing proves that its answer is whole: it has neither "
                "content-length nor chunks, and is no complete JSON"
            )
        if not is_readable(answer.status, answer.content_type, body):
            unreadable = EngineFailed(
                f"the engine answered with status {answer.status} and {len(body)} bytes that are no JSON, although "
                "their content type says so: see the engine's log"
            )
            return Settle(Outcome.FAILED, attempt.cutter.fail(unreadable))
        used = self._count_usage(attempt.lease.job, verdict, body)
        headers = _headers(attempt.lease, answer)
        return Settle(verdict, attempt.cutter.whole(answer.status, answer.content_type, body, headers), used)

    async def stream(
        self, attempt: Attempt, answer: EngineAnswer, verdict: Outcome, continuation: Continuation | None
    ) -> Ending:
        """A stream, frame by frame. Raises ``EngineFailed`` if it ends before its end."""
        cutter = attempt.cutter
        attempt.sender = sender = self._sender(attempt)
        headers = _headers(attempt.lease, answer)
        cutter.head(answer.status, answer.content_type, continued=continuation is not None, headers=headers)
        relayed = _RelayedStream(self, attempt, sender, continuation)
        try:
            await self._read_stream(attempt, answer, relayed)
        except _TooLarge:
            return Settle(Outcome.FAILED, await sender.close() + cutter.fail(self._too_large()))
        finally:
            attempt.stall.reading = False
        used = self._count_usage(attempt.lease.job, verdict, relayed.end, attempt.events)
        rest = cutter.feed(continuation.end()) if continuation is not None else b""
        last = cutter.finish(delimited=answer.delimited) if verdict is Outcome.DONE else cutter.end()
        if last is None:
            raise _cut_short(answer.delimited)
        return Settle(verdict, await sender.close() + rest + last, used)

    async def whole(self, attempt: Attempt, answer: EngineAnswer, continuation: Continuation | None) -> WholeAnswer:
        """The answer of a stream that nobody reads as one, behind what earlier attempts said if it is continued. Raises
        ``EngineFailed`` if it ends before its end, or is too large."""
        job, stall = attempt.lease.job, attempt.stall
        whole = attempt.whole = WholeAnswer(job.path, job.prefix if continuation is not None else "")

        def take(data: bytes) -> None:
            self.output_count += 1
            stall.pieces += 1
            whole.add(data if continuation is None else continuation.feed(data))
            if whole.size > self.max_answer_bytes:
                raise self._too_large()

        stall.reading = True
        try:
            async with aclosing(answer.chunks()) as pieces:
                async for piece in pieces:
                    take(piece)
                    if await answer.read_in_steps(self._step_reader, take):
                        break
        finally:
            stall.reading = False
        if continuation is not None:
            whole.add(continuation.end())
        if not (whole.failure or whole.is_complete):
            raise _cut_short(answer.delimited)
        return whole

    def settle_whole(
        self, attempt: Attempt, whole: WholeAnswer, verdict: Outcome, answer: EngineAnswer | None
    ) -> Settle:
        """The end of an attempt with ``whole``, an answer or an error, as one that was not streamed. ``answer``: the
        engine's, with its headers."""
        status, body = whole.failure or (200, whole.body())
        used = self._count_usage(attempt.lease.job, verdict, body)
        headers = {} if answer is None else _headers(attempt.lease, answer)
        return Settle(verdict, attempt.cutter.whole(status, "application/json", body, headers), used)

    def _count_usage(self, job: Job, verdict: Outcome, end: bytes, events: int = 0) -> int | None:
        """What an answer has cost, by its last bytes or its ``events``. One that is an error has cost nothing unless it
        says so."""
        usage = read_usage(end, events)
        self._metrics.usage(job.model, usage)
        cost = usage.cost(job.body)
        return 0 if cost is None and verdict is Outcome.FAILED else cost

    async def _read_stream(self, attempt: Attempt, answer: EngineAnswer, relayed: _RelayedStream) -> None:
        """Piece by piece until a frame has left, without delay; then with the other streams, where that can be."""
        stall = attempt.stall
        stall.reading = True
        async with aclosing(answer.chunks()) as pieces:
            async for piece in pieces:
                stall.reading = False
                begins = not attempt.cutter.begun
                relayed.take(piece)
                await relayed.sender.sent()
                if begins and attempt.cutter.begun and relayed.continuation is not None and attempt.lease.suspect:
                    await self._clear_suspicion(attempt.lease)
                stall.reading = True
                if not attempt.cutter.begun:
                    continue
                try:
                    if await answer.read_in_steps(self._step_reader, relayed.take_in_step):
                        return
                except _Held:
                    stall.reading = False
                    await relayed.sender.sent()
                    stall.reading = True

    def _sender(self, attempt: Attempt) -> FrameSender:
        job = attempt.lease.job
        if job.persisted:
            return self._frame_batcher.open_persisted(attempt.lease, lambda: attempt.stop(StopReason.JOB_ENDED))
        shard = shard_of_job(job.id)
        return self._frame_batcher.open(shard, job.reply_to, lambda: attempt.stop(StopReason.ROUTER_GONE))

    async def _clear_suspicion(self, lease: Lease) -> None:
        """What crashed engines before is behind this job now: its worker may hold the next suspect."""
        try:
            await self._queue.attempts.clear_suspicion(lease)
        except InferqError as error:
            log.warning("suspicion_not_cleared", error=error.message, **log_fields(lease))

    def _too_large(self) -> EngineFailed:
        return EngineFailed(
            f"the engine's answer is larger than the {self.max_answer_bytes} bytes that its worker accepts; "
            "ask for less, or raise INFERQ_WORKER_MAX_ANSWER_BYTES"
        )


class _TooLarge(Exception):
    """The engine's answer is larger than is accepted."""


class _Held(Exception):
    """The Router of a stream does not read: its engine is not read with the others."""


class _RelayedStream:
    """One stream on its way from the engine to ``sender``."""

    __slots__ = ("_attempt", "_before", "_cutter", "_last", "_relay", "_size", "_stall", "continuation", "sender")

    def __init__(
        self, relay: AnswerRelay, attempt: Attempt, sender: FrameSender, continuation: Continuation | None
    ) -> None:
        self.sender = sender
        self.continuation = continuation
        self._before = self._last = b""
        self._attempt = attempt
        self._relay = relay
        self._cutter = attempt.cutter
        self._stall = attempt.stall
        self._size = 0

    @property
    def end(self) -> bytes:
        """What came last: an engine may send its usage and its end marker apart."""
        return self._before + self._last

    def take(self, data: bytes) -> None:
        """Cut and hand over what came from the engine. Raises ``_TooLarge``."""
        relay, cutter = self._relay, self._cutter
        relay.output_count += 1
        self._stall.pieces += 1
        self._size += len(data)
        self._before, self._last = self._last, data
        self._attempt.events += data.count(b"\n\n")
        if self._size > relay.max_answer_bytes:
            raise _TooLarge
        if self.continuation is not None:
            data = self.continuation.feed(data)
        urgent = not cutter.begun
        frame = cutter.feed(data)
        if frame:
            self.sender.put(frame, urgent=urgent)

    def take_in_step(self, data: bytes) -> None:
        """:meth:`take` of what was read with other streams. Raises ``_Held`` too."""
        self.take(data)
        if self.sender.is_held:
            raise _Held


def _headers(lease: Lease, answer: EngineAnswer) -> Mapping[str, str]:
    """The headers of ``answer`` that the client is to see. After more than one attempt its own retries would multiply
    the queue's."""
    if answer.status >= 500 and lease.attempt > 1:
        return {**answer.headers, "x-should-retry": "false"}
    return answer.headers


def _cut_short(delimited: bool) -> EngineFailed:
    """The error for a stream that ended before its end."""
    if delimited:
        return EngineFailed("the engine ended the stream without its end marker, and before all of it was said")
    return EngineGone("the engine closed the connection before the end of the stream")
