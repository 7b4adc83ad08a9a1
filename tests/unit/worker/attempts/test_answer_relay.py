"""Relaying an engine's answer: what is passed on, and what is no whole answer."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from queue_schemas import (
    END,
    HEAD,
    EngineFailed,
    Outcome,
)
from telemetry import render_metrics
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain


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


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n", b"data: [DO", b"NE]\n\n"],
        [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n" + b"x" * 200],
        [b"data: 1\n\n", b"data: 2\n\n"],
        [b"data: 1\n\n", b"data: 2\n\n", EngineFailed("broke")],
        [b"data: 1\n\n" * 20, b"data: [DONE]\n\n"],
    ],
    ids=["whole", "too large", "cut short", "broken", "too large at once"],
)
async def test_a_stream_is_relayed_alike_whether_read_in_pieces_or_in_steps(pieces: list[bytes | Exception]) -> None:
    """Frames, their numbers, outcome, limit on size and counted events are the same."""
    ends = []
    for in_steps in (False, True):
        bench = Bench(Answer(200, SSE, list(pieces), in_steps=in_steps), max_answer_bytes=150)
        await bench.run(lease(stream=True))
        frames = bench.broker.published + [frame for _, _, settled in bench.broker.settled for frame in settled]
        assert [frame.seq for frame in frames] == list(range(len(frames)))
        outcomes = [outcome for _, outcome, _ in bench.broker.settled]
        # An attempt that is released does not wait until all that it has read is sent.
        data = b"".join(frame.data for frame in frames) if outcomes else b""
        shown = render_metrics(bench.metrics.registry)[0]
        tokens = [line for line in shown.splitlines() if line.startswith(b"inferq_tokens_total{")]
        ends.append((data, outcomes, bench.broker.released, bench.attempts.output_count, tokens))
        assert bench.frame_batcher._bytes == 0
    assert ends[0] == ends[1]


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
async def test_a_stream_without_its_end_counts_as_a_broken_connection(path: str, pieces: list[bytes]) -> None:
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
