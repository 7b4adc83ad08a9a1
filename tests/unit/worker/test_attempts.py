"""Running attempts: every one ends settled, released or dropped."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from broker import Broker
from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    BadRequest,
    BrokerUnavailable,
    EngineFailed,
    EngineState,
    Frame,
    Job,
    Lane,
    Lease,
    Outcome,
    Settled,
    unpack_frames,
)
from telemetry import MetricsRegistry
from tests.support.queue import make_job
from tests.support.waiting import eventually
from worker.attempts import Attempts, StreamTimeouts
from worker.engines import EngineAnswer, EngineCall, EngineGone
from worker.frame_batcher import FrameBatcher
from worker.metrics import WorkerMetrics

SSE = "text/event-stream; charset=utf-8"
ATTEMPT_IDS = itertools.count()


class Answer:
    """An answer made of pieces; an exception among them is raised, an event is waited for."""

    headers: Mapping[str, str] = {}

    def __init__(self, status: int, content_type: str, pieces: list[Any], *, delimited: bool = True) -> None:
        self.delimited = delimited
        self.retry_after_s: float | None = None
        self.status = status
        self.content_type = content_type
        self._pieces = pieces

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, asyncio.Event):
                await piece.wait()
            else:
                yield piece

    async def read(self, limit_bytes: int) -> bytes:
        return b"".join([piece async for piece in self.chunks()])


class ScriptedEngine:
    """Answers every call with ``answer``; counts the calls that were left before their end."""

    def __init__(self, answer: Answer | Exception) -> None:
        self.answer = answer
        self.calls: list[EngineCall] = []
        self.left_early = 0
        self.state, self.detail, self.models = EngineState.READY, "", ("m",)

    async def run(self, changed: Callable[[], None]) -> None: ...

    @asynccontextmanager
    async def call(self, call: EngineCall) -> AsyncIterator[EngineAnswer]:
        self.calls.append(call)
        if isinstance(self.answer, Exception):
            raise self.answer
        try:
            yield self.answer
        except asyncio.CancelledError:
            self.left_early += 1
            raise

    async def progress(self) -> int | None:
        return 0

    async def stop(self, limit_s: float) -> None: ...


class RecordingBroker:
    """Takes what attempts end with."""

    def __init__(self) -> None:
        self.attempts = self.output = self
        self.settled: list[tuple[Lease, Outcome, list[Frame]]] = []
        self.released: list[tuple[str, bool]] = []
        self.crashes: list[list[Lease]] = []
        self.published: list[Frame] = []
        self.appended: list[Frame] = []
        self.append_answer = Settled.OK
        self.kept: list[Frame] = []
        self.unreadable = False
        self.gone: set[str] = set()
        self.avoided_ms = 0
        self.failures = 0
        self.released_by = asyncio.Event()
        self.released_by.set()

    async def settle(self, lease: Lease, outcome: Outcome, frames: bytes = b"") -> Settled:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.settled.append((lease, outcome, unpack_frames(frames)))
        return Settled.OK

    async def release(self, lease: Lease, reason: str, *, counted: bool, avoid_ms: int) -> Settled:
        self.avoided_ms = avoid_ms
        await self.released_by.wait()
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.released.append((reason, counted))
        return Settled.OK

    async def report_crash(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.crashes.append(list(leases))
        return [Settled.OK] * len(leases)

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        self.appended += unpack_frames(frames)
        return self.append_answer

    async def frames(self, job_id: str) -> AsyncIterator[Frame]:
        """What earlier attempts said."""
        if self.unreadable:
            raise BrokerUnavailable("away")
        for frame in self.kept:
            yield frame

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> set[str]:
        for packed in frames.values():
            self.published += unpack_frames(packed)
        return self.gone & frames.keys()


class Bench:
    """Attempts on a scripted engine, with everything around them."""

    def __init__(self, answer: Answer | Exception, *, max_answer_bytes: int = 10_000) -> None:
        self.engine = ScriptedEngine(answer)
        self.broker = RecordingBroker()
        self.elsewhere = True
        self.ended: list[bool] = []
        self.waits_s: list[float | None] = []
        self.frame_batcher = FrameBatcher(
            self.broker.attempts.publish, self.broker.attempts.append, interval_ms=0, limit_bytes=10_000
        )
        self.attempts = Attempts(
            self.engine,
            cast(Broker, self.broker),
            self.frame_batcher,
            WorkerMetrics(MetricsRegistry("worker")),
            max_answer_bytes=max_answer_bytes,
            elsewhere=self._elsewhere,
            ended=self._end,
        )

    async def _elsewhere(self, _pool: str) -> bool:
        return self.elsewhere

    def _end(self, _lease: Lease, wait_s: float | None) -> None:
        self.ended.append(wait_s is not None)
        self.waits_s.append(wait_s)

    @asynccontextmanager
    async def running(self, *leases: Lease) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            flusher = group.create_task(self.frame_batcher.run())
            self.attempts.start(leases, group)
            try:
                yield
                await asyncio.wait_for(self.attempts.idle(), 10)
            finally:
                flusher.cancel()

    async def run(self, *leases: Lease) -> None:
        async with self.running(*leases):
            pass


def lease(attempt: int = 1, remaining_ms: int = 60_000, **fields: Any) -> Lease:
    job: Job = make_job(reply_to="router.0123456789abcdef", request_id="req_1", **fields)
    return Lease(job, 1, f"attempt-{next(ATTEMPT_IDS)}", attempt, remaining_ms, 5)


def plain(status: int, body: bytes = b"{}") -> Answer:
    return Answer(status, "application/json", [body])


async def test_a_plain_answer_is_settled_in_one_frame() -> None:
    """The engine gets the client's bytes and ids; its answer is settled as it is, and the slot is free."""
    bench = Bench(plain(200, b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}'))
    job_lease = lease(traceparent="00-a-b-01")
    await bench.run(job_lease)
    ((settled, outcome, (frame,)),) = bench.broker.settled
    assert (settled, outcome, frame.flags, frame.status) == (job_lease, Outcome.DONE, HEAD | END, 200)
    call = bench.engine.calls[0]
    assert (call.body, call.traceparent) == (job_lease.job.body, "00-a-b-01")
    assert uuid.UUID(call.call_id).version == 4
    assert bench.ended == [False]
    assert len(bench.attempts) == 0


async def test_a_client_error_is_settled_as_failed_and_passed_on() -> None:
    """A 4xx of the engine is the answer, body and all."""
    bench = Bench(plain(422, b'{"error": "of the engine"}'))
    await bench.run(lease())
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status, frame.data) == (Outcome.FAILED, 422, b'{"error": "of the engine"}')


@pytest.mark.parametrize("status", [300, 301, 304, 307, 308])
async def test_a_redirect_is_no_answer(status: int) -> None:
    """[H44] A client never gets the redirect of an engine, whose Location it could not use: the job is tried elsewhere,
    and fails at last with the engine's fault."""
    bench = Bench(plain(status, b""))
    await bench.run(lease())
    assert bench.broker.released[0][1] is True
    assert not bench.broker.settled
    bench = Bench(plain(status, b""))
    await bench.run(lease(attempt=3))
    ((_, outcome, frames),) = bench.broker.settled
    assert outcome is Outcome.FAILED
    assert frames[0].status == 502


async def test_an_engine_error_is_released_until_the_last_attempt() -> None:
    """A 5xx spends the attempt; the last attempt gives the client the engine's own answer."""
    bench = Bench(plain(503, b"busy"))
    await bench.run(lease(attempt=1, max_attempts=2))
    assert bench.broker.released == [("the engine answered 503", True)]
    assert bench.ended == [True]
    await bench.run(lease(attempt=2, max_attempts=2))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status, frame.data) == (Outcome.FAILED, 503, b"busy")


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_with_nowhere_else_to_go_an_engine_error_is_the_answer_at_once(status: int, stream: bool) -> None:
    """[C8] No other worker serves the model: asking the same engine again multiplies its load and the client's wait."""
    bench = Bench(Answer(status, SSE if stream else "application/json", [b"busy"]))
    bench.elsewhere = False
    await bench.run(lease(stream=stream))
    assert bench.broker.released == []
    ((_, outcome, frames),) = bench.broker.settled
    assert (outcome, frames[0].status, b"".join(frame.data for frame in frames)) == (Outcome.FAILED, status, b"busy")


@pytest.mark.parametrize("fields", [{"lane": Lane.BATCH}, {"lane": Lane.BACKGROUND}, {"persisted": True}])
async def test_what_nobody_asks_again_is_tried_again_on_the_only_engine(fields: dict[str, Any]) -> None:
    """[C8] A line of a batch, a background job, an answer that is kept: no client repeats it."""
    bench = Bench(plain(500))
    bench.elsewhere = False
    await bench.run(lease(**fields))
    assert bench.broker.released == [("the engine answered 500", True)]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_an_engine_that_says_when_to_come_back_is_not_asked_before(elsewhere: bool) -> None:
    """[C8] A 503 with ``Retry-After`` waits as said, within the deadline; another worker may take the job meanwhile."""
    answer = plain(503, b"busy")
    answer.retry_after_s = 7.0
    bench = Bench(answer)
    bench.elsewhere = elsewhere
    await bench.run(lease(remaining_ms=60_000))
    assert bench.broker.released == [("the engine answered 503", True)]
    assert (bench.broker.avoided_ms, bench.waits_s) == (7_000, [7.0])
    await bench.run(lease(remaining_ms=5_000))
    if elsewhere:
        assert bench.broker.avoided_ms == 2_000
    else:
        ((_, outcome, (frame,)),) = bench.broker.settled
        assert (outcome, frame.status) == (Outcome.FAILED, 503)
    last = Bench(answer)
    await last.run(lease(attempt=3, max_attempts=3))
    assert len(last.broker.settled) == 1


@pytest.mark.parametrize(
    "answer", [plain(500), Answer(500, SSE, [b"busy"]), EngineFailed("refused")], ids=["plain", "stream", "none"]
)
async def test_a_client_is_told_not_to_retry_what_was_retried_already(answer: Answer | Exception) -> None:
    """[C8] SDKs obey ``x-should-retry``: else their three tries would become nine. After one attempt it is theirs."""
    told = []
    for attempt, attempts in ((1, 1), (3, 3)):
        bench = Bench(answer)
        await bench.run(lease(attempt, max_attempts=attempts, headers={}))
        told.append(bench.broker.settled[0][2][0].headers.get("x-should-retry"))
    assert told == [None, "false"]


async def test_a_crash_is_tried_again_on_the_only_engine() -> None:
    """[C8] A lost connection is no answer: the engine is started again, and asked again."""
    bench = Bench(EngineGone("it crashed"))
    bench.elsewhere = False
    await bench.run(lease())
    assert len(bench.broker.crashes) == 1
    assert bench.broker.settled == []


LIMITS = StreamTimeouts(text_s=120.0, buffered_s=1_800.0)
CHATTING = {"model": "m", "messages": [], "stream": True}


@asynccontextmanager
async def silent_beside_another(
    bench: Bench, job_lease: Lease, pieces: int = 2
) -> AsyncIterator[Callable[[float, float], None]]:
    """The stream of ``job_lease`` has said ``pieces`` and no more; gives a way to let time pass beside a busy one."""
    leave = asyncio.Event()
    bench.engine.answer = Answer(200, SSE, [*[b"data: 1\n\n"] * pieces, leave])

    def pass_time(begin: float, end: float) -> None:
        for second in range(int(begin), int(end)):
            bench.attempts._relay.output_count += 1
            bench.attempts.stop_stalled(float(second), LIMITS)

    async with bench.running(job_lease):
        await eventually(lambda: bench.attempts.output_count == 1 + pieces, "it has begun")
        try:
            yield pass_time
        finally:
            leave.set()


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_schema"}},
        {"reasoning_effort": "high"},
    ],
)
async def test_a_stream_that_engines_hold_back_is_asked_once(asked: dict[str, Any]) -> None:
    """[C5] With tools, a format or reasoning an engine may say nothing for minutes while its other streams go on."""
    bench = Bench(plain(200))
    job_lease = lease(stream=True, body=json.dumps(CHATTING | asked).encode())
    async with silent_beside_another(bench, job_lease) as pass_time:
        pass_time(0, 1_700)
        await asyncio.sleep(0)
        assert len(bench.attempts) == 1
    assert len(bench.engine.calls) == 1
    assert bench.engine.left_early == 0


async def test_a_forgotten_stream_is_given_up_once_where_there_is_no_other_engine() -> None:
    """[C5] The same engine would do the same again: the client is told at once, and which limit it was."""
    for asked, pieces, seconds, setting in (
        ({}, 2, 122, "STREAM_IDLE_TIMEOUT_MS"),
        ({}, 1, 1_802, "BUFFERED_STREAM_TIMEOUT_MS"),
        ({"tools": [{}]}, 2, 1_802, "BUFFERED_STREAM_TIMEOUT_MS"),
    ):
        bench = Bench(plain(200))
        bench.elsewhere = False
        async with silent_beside_another(
            bench, lease(stream=True, body=json.dumps(CHATTING | asked).encode()), pieces
        ) as pass_time:
            pass_time(0, seconds)
            await asyncio.wait_for(bench.attempts.idle(), 10)
        ((_, outcome, frames),) = bench.broker.settled
        assert outcome is Outcome.FAILED
        assert setting.encode() in frames[-1].data
        assert frames[-1].flags & END


@pytest.mark.parametrize(("attempt", "released"), [(1, 1), (2, 0)])
async def test_a_forgotten_stream_is_tried_elsewhere_once(attempt: int, released: int) -> None:
    """[C5] Another engine may do better; one that forgets it as well is the last."""
    bench = Bench(plain(200))
    job_lease = lease(attempt, stream=True, body=json.dumps(CHATTING).encode())
    async with silent_beside_another(bench, job_lease) as pass_time:
        pass_time(0, 122)
        await asyncio.wait_for(bench.attempts.idle(), 10)
    assert (len(bench.broker.released), len(bench.broker.settled)) == (released, 1 - released)


async def test_no_connection_is_released_and_a_502_at_last() -> None:
    """Without any answer the last attempt ends in an error object that says what happened."""
    bench = Bench(EngineFailed("refused"))
    await bench.run(lease(attempt=1, max_attempts=2))
    assert bench.broker.released == [("refused", True)]
    await bench.run(lease(attempt=2, max_attempts=2))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 502)
    assert json.loads(frame.data)["error"]["code"] == "engine_failed"


async def test_a_request_no_engine_would_get_is_answered_400_at_once() -> None:
    """The client is told on the first attempt; nothing is tried again."""
    bench = Bench(BadRequest("its content type cannot be sent"))
    await bench.run(lease(attempt=1, max_attempts=3))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 400)
    assert json.loads(frame.data)["error"]["code"] == "invalid_request"
    assert not bench.broker.released


async def test_a_stream_is_published_as_it_comes_and_ends_with_the_settle() -> None:
    """HEAD comes with the first bytes; END comes with the settle, after everything else."""
    more = asyncio.Event()
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", more, b"data: 2\n\n", b"data: [DONE]\n\n"]))
    async with bench.running(lease(stream=True)):
        await eventually(lambda: bench.broker.published, "the first frame is out before the second exists")
        more.set()
    ((_, outcome, settled),) = bench.broker.settled
    frames = bench.broker.published + settled
    assert outcome is Outcome.DONE
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert frames[0].flags & HEAD
    assert [bool(frame.flags & END) for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert b"".join(frame.data for frame in frames) == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_a_stream_that_breaks_is_released_even_on_the_last_attempt() -> None:
    """Half a stream is never settled as an answer."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", EngineFailed("broke")]))
    await bench.run(lease(stream=True, attempt=3, max_attempts=3))
    assert bench.broker.released == [("broke", True)]
    assert not bench.broker.settled
    assert bench.frame_batcher._bytes == 0


@pytest.mark.parametrize(
    ("path", "pieces"),
    [
        ("/v1/chat/completions", [b'data: {"choices": []}\n\n']),
        ("/v1/completions", [b'data: {"choices": []}\n\n', b"data: [DO"]),
        ("/v1/messages", [b'event: ping\ndata: {"type": "ping"}\n\n']),
        ("/v1/responses", [b'data: {"type": "response.created"}\n\n']),
        ("/v1/audio/transcriptions", [b'data: {"delta": "x"}\n\n']),
        ("/v1/chat/completions", []),
    ],
)
async def test_a_stream_without_its_end_is_lost_as_if_the_connection_was_reset(path: str, pieces: list[bytes]) -> None:
    """[C3] The engine closed a connection that had neither length nor chunks: half a text never ends normally, but goes
    to the next attempt."""
    bench = Bench(Answer(200, SSE, list(pieces), delimited=False))
    await bench.run(lease(stream=True, path=path))
    assert not bench.broker.settled
    ((crashed,),) = bench.broker.crashes
    assert crashed.job.path == path


async def test_a_stream_that_ends_properly_without_its_end_is_an_engine_failure() -> None:
    """[C3] Chunks that end are no end of a chat: it is tried again, and the client told if there was nothing before."""
    half = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": null}]}\n\n'
    bench = Bench(Answer(200, SSE, [half]))
    await bench.run(lease(stream=True))
    ((reason, counted),) = bench.broker.released
    assert "without its end marker" in reason
    assert counted
    nothing = Bench(Answer(200, SSE, []))
    await nothing.run(lease(stream=True, attempt=3))
    ((_, outcome, (frame,)),) = nothing.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 502)


async def test_an_engine_that_sends_no_done_is_served_and_its_streams_get_one() -> None:
    """[C3] Every choice has its finish reason: the text is whole, and clients that wait for ``[DONE]`` get it."""
    end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
    bench = Bench(Answer(200, SSE, [b'data: {"choices": []}\n\n', end], delimited=False))
    await bench.run(lease(stream=True))
    ((_, outcome, frames),) = bench.broker.settled
    assert outcome is Outcome.DONE
    assert frames[-1].data == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("content_type", "body", "whole"),
    [
        ("application/json", b'{"choices": []}', True),
        ("application/json", b'{"choices": [', False),
        ("application/json", b"12", False),
        ("application/json", b"", False),
        ("text/plain", b"half a transcript", False),
    ],
)
async def test_a_plain_answer_that_only_a_closed_connection_ends_must_prove_itself(
    content_type: str, body: bytes, whole: bool
) -> None:
    """[C3] Cut short, it would pass for a shorter answer: JSON that is complete proves it whole, nothing else does."""
    bench = Bench(Answer(200, content_type, [body], delimited=False))
    await bench.run(lease())
    assert (len(bench.broker.settled), len(bench.broker.crashes)) == ((1, 0) if whole else (0, 1))
    error = Bench(Answer(400, content_type, [body], delimited=False))
    await error.run(lease())
    ((_, outcome, (frame,)),) = error.broker.settled
    assert (outcome, frame.status, frame.data) == (Outcome.FAILED, 400, body)


@pytest.mark.parametrize(
    "body", [b"", b"  ", b"Internal Server Error", b"<html></html>", b'{"choices": [', b"Internal" * 99]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_success_that_is_not_what_its_type_says_is_a_failure(body: bytes, stream: bool) -> None:
    """[H14] A status of 200 with JSON that is none: SDKs fail in decoding, and end a stream without a word."""
    bench = Bench(plain(200, body))
    await bench.run(lease(stream=stream))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 502)
    assert b"no JSON" in frame.data


async def test_an_answer_of_another_type_passes_as_it_is() -> None:
    """[H14] Texts, recordings and answers without a body are not looked into."""
    for answer in (
        Answer(200, "text/plain", [b""]),
        Answer(200, "application/octet-stream", [b"\x00"]),
        Answer(204, "", []),
        Answer(200, "application/json", [b' [1, {"a": 2}]\r\n']),
        Answer(200, "application/json", [b"null"]),
        Answer(200, "application/json", [b'"%b"' % (b"heard " * 20)]),
    ):
        bench = Bench(answer)
        await bench.run(lease())
        assert bench.broker.settled[0][1] is Outcome.DONE


async def test_an_abort_closes_the_engine_call_and_tells_nobody() -> None:
    """The queue has ended the job already: the connection closes, nothing is settled or released."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    job_lease = lease(stream=True)
    async with bench.running(job_lease):
        await eventually(lambda: bench.broker.published, "the stream has begun")
        bench.attempts.abort(job_lease.job.id, "cancelled by the client")
    assert bench.engine.left_early == 1
    assert not bench.broker.settled
    assert not bench.broker.released


async def test_an_abort_that_overtakes_its_claim_is_remembered() -> None:
    """The abort may be read before the claim's answer: the job is then not sent to the engine, but handed back, since a
    queue that lost its latest writes may mean another life of it. That one, which comes next, is run."""
    bench = Bench(plain(200))
    job_lease = lease()
    bench.attempts.abort(job_lease.job.id, "cancelled")
    await bench.run(job_lease)
    assert not bench.engine.calls
    assert not bench.broker.settled
    assert bench.broker.released == [("it was aborted here before", False)]
    await bench.run(job_lease)
    assert len(bench.broker.settled) == 1


async def test_an_abort_before_the_first_step_of_its_task_is_clean() -> None:
    """A job aborted in the same breath in which it was started leaves no trace and frees its slot."""
    bench = Bench(plain(200))
    job_lease = lease()
    async with bench.running(job_lease):
        bench.attempts.abort(job_lease.job.id, "cancelled")
    assert bench.ended == [False]
    assert len(bench.attempts) == 0


async def test_a_job_whose_time_ran_out_is_answered_504() -> None:
    """The sweep stops it; the client is told, as an answer or, in a begun stream, as an event."""
    bench = Bench(Answer(200, SSE, [asyncio.Event()]))
    async with bench.running(lease(remaining_ms=1)):
        await eventually(lambda: bench.engine.calls, "the engine is asked")
        bench.attempts.stop_late(asyncio.get_running_loop().time() + 1)
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.EXPIRED, 504)
    begun = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    async with begun.running(lease(remaining_ms=1, stream=True)):
        await eventually(lambda: begun.broker.published, "the stream has begun")
        begun.attempts.stop_late(asyncio.get_running_loop().time() + 1)
    ((_, _, frames),) = begun.broker.settled
    assert b"deadline_exceeded" in frames[-1].data
    assert frames[-1].flags == END


async def test_a_router_that_is_gone_ends_its_streams() -> None:
    """Nobody listens: the engine call is closed and the queue told, without spending the attempt."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    job_lease = lease(stream=True)
    bench.broker.gone = {job_lease.job.reply_to}
    await bench.run(job_lease)
    assert bench.engine.left_early == 1
    assert bench.broker.released == [("nobody waits for the answer", False)]


async def test_jobs_are_handed_back_uncounted_when_the_worker_stops() -> None:
    """At the end of a drain running jobs go to others as if never started."""
    bench = Bench(Answer(200, SSE, [asyncio.Event()]))
    async with bench.running(lease(), lease()):
        await eventually(lambda: len(bench.engine.calls) == 2, "both run")
        bench.attempts.hand_back()
    assert bench.broker.released == [("its worker stops", False)] * 2


async def test_an_answer_past_the_limit_is_an_error_not_a_retry() -> None:
    """Too large here is too large everywhere: the client is told at once, plain or streamed."""
    bench = Bench(plain(200, b"x" * 101), max_answer_bytes=100)
    await bench.run(lease())
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 502)
    assert b"larger than the 100 bytes" in frame.data
    streamed = Bench(Answer(200, SSE, [b"data: 1\n\n"] * 20), max_answer_bytes=100)
    await streamed.run(lease(stream=True))
    ((_, outcome, frames),) = streamed.broker.settled
    assert outcome is Outcome.FAILED
    assert b"larger than" in frames[-1].data


async def test_an_answer_is_settled_after_an_outage() -> None:
    """An answer that is there is not thrown away because Redis was away for a while."""
    bench = Bench(plain(200))
    bench.broker.failures = 1
    await bench.run(lease())
    assert len(bench.broker.settled) == 1


async def test_a_job_is_released_after_an_outage() -> None:
    """A lease is not kept by a live worker because Redis was away when it wanted to give it up."""
    bench = Bench(plain(503))
    bench.broker.failures = 1
    await bench.run(lease())
    assert bench.broker.released == [("the engine answered 503", True)]


async def test_an_outage_past_the_deadline_ends_the_attempt() -> None:
    """Nobody waits any more: the slot is free again, whether the queue was told or not."""
    for answer in (plain(200), plain(503)):
        bench = Bench(answer)
        bench.broker.failures = 100
        await bench.run(lease(remaining_ms=0))
        assert bench.broker.failures == 99
        assert len(bench.ended) == 1


async def test_a_released_job_may_come_back_before_the_release_is_answered() -> None:
    """Two attempts of one job live side by side for a moment: an abort reaches both, and both end by themselves."""
    bench = Bench(plain(503))
    first = lease()
    again = Lease(first.job, 2, "attempt-again", 2, 60_000, 5)
    async with asyncio.TaskGroup() as group:
        bench.broker.released_by.clear()
        bench.attempts.start([first], group)
        await eventually(lambda: bench.engine.calls, "the engine refused the first attempt")
        bench.engine.answer = Answer(200, SSE, [asyncio.Event()])
        bench.attempts.start([again], group)
        await eventually(lambda: len(bench.engine.calls) == 2, "the second attempt runs")
        bench.broker.released_by.set()
        await eventually(lambda: len(bench.ended) == 1, "the first attempt is over")
        assert len(bench.attempts) == 1
        bench.attempts.abort(first.job.id, "cancelled")
        await asyncio.wait_for(bench.attempts.idle(), 10)
    assert bench.ended == [True, False]
    assert bench.engine.left_early == 1


async def test_a_job_that_trips_over_a_fault_of_ours_ends_alone() -> None:
    """An unforeseen exception spends the job's attempt; its neighbours and the worker go on."""
    bench = Bench(ValueError("unforeseen"))
    await bench.run(lease())
    assert bench.broker.released == [("the worker tripped over it (ValueError)", True)]


async def test_all_that_ran_on_a_crashed_engine_is_ended_together() -> None:
    """One call names every job, so that the queue can tell suspects from neighbours; it is sent until answered."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", EngineGone("the engine crashed")]))
    bench.broker.failures = 1
    leases = [lease(stream=True) for _ in range(5)]
    await bench.run(*leases)
    (crash,) = bench.broker.crashes
    assert {lease.attempt_id for lease in crash} == {lease.attempt_id for lease in leases}
    assert bench.ended == [True] * 5
    assert bench.broker.released == []


async def test_one_broken_connection_is_no_crash() -> None:
    """While others go on beside it, the engine lives: the job is released alone."""
    go_on = asyncio.Event()
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", go_on, b"data: [DONE]\n\n"]))
    async with asyncio.TaskGroup() as group:
        bench.attempts.start([lease(stream=True)], group)
        flush = group.create_task(bench.frame_batcher.run())
        await eventually(lambda: len(bench.broker.published) == 1, "one stream has begun")
        bench.engine.answer = Answer(200, SSE, [EngineGone("the connection broke")])
        bench.attempts.start([lease(stream=True)], group)
        await eventually(lambda: bench.broker.released, "the other one is released")
        go_on.set()
        await bench.attempts.idle()
        flush.cancel()
    assert bench.broker.released == [("the connection broke", True)]
    assert bench.broker.crashes == []
    assert len(bench.broker.settled) == 1


def stored_lease(*, epoch: int = 1, attempt: int = 1, remaining_ms: int = 60_000, **fields: Any) -> Lease:
    """A lease of a persisted stream."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    defaults = {"persisted": True, "stream": True, "on_loss": "continue", "body": json.dumps(asked).encode()}
    job = make_job(**(defaults | fields))
    return Lease(job, epoch, f"attempt-{next(ATTEMPT_IDS)}", attempt, remaining_ms, 5)


def said(job_lease: Lease, *events: bytes) -> list[Frame]:
    """What an earlier attempt of the job has said."""
    job_id = job_lease.job.id
    return [
        Frame(job_id, 1, "a1", seq, HEAD if seq == 0 else 0, data, *((200, SSE) if seq == 0 else ()))
        for seq, data in enumerate(events)
    ]


def told(text: str, finish: str | None = None) -> bytes:
    """An event of a chat."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


async def test_a_stored_stream_is_added_to_its_output() -> None:
    """Its frames go there and to no Router; the last ones with the settle."""
    hold = asyncio.Event()
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", hold, b"data: [DONE]\n\n"]))
    async with bench.running(stored_lease()):
        await eventually(lambda: bench.broker.appended, "it is kept", every_s=0.001)
        hold.set()
    ((_, outcome, rest),) = bench.broker.settled
    assert outcome is Outcome.DONE
    assert bench.broker.published == []
    frames = {frame.seq: frame for frame in (*bench.broker.appended, *rest)}
    assert b"".join(frames[seq].data for seq in sorted(frames)) == b"data: 1\n\ndata: [DONE]\n\n"
    assert rest[-1].flags & END


async def test_an_attempt_whose_append_is_fenced_stops() -> None:
    """It leaves its engine, and neither settles nor releases what is not its own any more."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    bench.broker.append_answer = Settled.FENCED
    await bench.run(stored_lease())
    assert bench.engine.left_early == 1
    assert (bench.broker.settled, bench.broker.released, bench.ended) == ([], [], [False])


async def test_a_stored_job_ends_with_an_engines_answer_or_with_none() -> None:
    """A lost connection on the last attempt is no answer to keep: the job is given up, so that the same key may be
    tried again."""
    bench = Bench(EngineFailed("it broke"))
    await bench.run(stored_lease(attempt=3))
    assert bench.broker.settled == []
    assert bench.broker.released == [("it broke", True)]


@pytest.mark.parametrize(
    ("events", "usage", "rest"),
    [
        ([told("Hi"), told("", "stop"), b"data: [DONE]\n\n"], True, b""),
        ([told("Hi"), told("", "stop")], False, b"data: [DONE]\n\n"),
    ],
)
async def test_an_answer_that_lacks_only_its_end_is_not_asked_for_again(
    events: list[bytes], usage: bool, rest: bytes
) -> None:
    """The worker died between the last words and the settle: the next one adds what is missing, and calls no engine."""
    bench = Bench(plain(500))
    body = {"model": "m", "messages": [], "stream_options": {"include_usage": usage}}
    job_lease = stored_lease(epoch=2, attempt=2, body=json.dumps(body).encode())
    bench.broker.kept = said(job_lease, *events)
    await bench.run(job_lease)
    ((_, outcome, frames),) = bench.broker.settled
    assert outcome is Outcome.DONE
    assert frames[0].flags & (HEAD | CONTINUED) == HEAD | CONTINUED
    assert frames[-1].flags & END
    assert b"".join(frame.data for frame in frames) == rest
    assert bench.engine.calls == []


@pytest.mark.parametrize(
    ("events", "fields", "asks"),
    [
        ([told("Hi "), told("there")], {}, "/tokenize"),
        ([told("Hi")], {"on_loss": "restart"}, "/v1/chat/completions"),
        ([b'data: {"odd": 1}\n\n'], {}, "/v1/chat/completions"),
        ([], {}, "/v1/chat/completions"),
    ],
    ids=["goes on", "restart", "not text", "nothing said"],
)
async def test_a_lost_stored_stream_goes_on_behind_what_was_kept(
    events: list[bytes], fields: dict[str, Any], asks: str
) -> None:
    """The engine is first asked how it reads the text so far, where there is one that may be continued; else the
    request is made as at first."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", b"data: [DONE]\n\n"]))
    job_lease = stored_lease(epoch=2, attempt=2, **fields)
    bench.broker.kept = said(job_lease, *events)
    await bench.run(job_lease)
    assert bench.engine.calls[0].path == asks
    assert bench.engine.calls[-1].body == job_lease.job.body  # what this engine answers to /tokenize is not tokens
    ((_, _, frames),) = bench.broker.settled
    assert not frames[0].flags & CONTINUED


async def test_a_stored_stream_whose_beginning_cannot_be_read_is_handed_back() -> None:
    """It is neither begun anew nor charged an attempt because Redis is away."""
    bench = Bench(plain(200))
    bench.broker.unreadable = True
    await bench.run(stored_lease(epoch=2, attempt=2))
    ((reason, counted),) = bench.broker.released
    assert "could not be read" in reason
    assert not counted
    assert bench.engine.calls == []
