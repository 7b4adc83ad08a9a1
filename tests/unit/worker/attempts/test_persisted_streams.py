"""Streams whose output is kept, and what a later attempt makes of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    EngineFailed,
    Frame,
    Lease,
    Outcome,
    Settled,
)
from tests.support.queue import make_job
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import ATTEMPT_IDS, SSE, Answer, Bench, plain


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
async def test_an_answer_that_lacks_only_its_end_is_not_requested_again(
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
