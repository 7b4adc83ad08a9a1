"""A restarted Redis, which may have lost its latest writes: what the Router does about its jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from broker import JobStatus
from queue_schemas import END, HEAD, Frame, Marker, MarkerKind, State
from tests.unit.router.fakes import SSE, Client, FakeQueue, router

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
DONE = b"data: [DONE]\n\n"


def chunk(text: str) -> bytes:
    body = {"id": "one", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_frames_of_an_attempt_that_redis_forgot_are_dropped(body: dict[str, Any]) -> None:
    """A worker still sends what the server lost: only the next attempt's frames count."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(body)
        job = await queue.job()
        queue.job_status = JobStatus(State.QUEUED, 1 << 20, "")
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        await _settle_down()
        queue.stream(job, chunk("stale"), end=False)
        queue.stream(job, chunk("new"), DONE, epoch=1 << 20)
        assert (await answer.done()).body == chunk("new") + DONE


async def test_of_two_attempts_of_one_epoch_the_one_that_redis_knows_counts() -> None:
    """The restarted Redis assigned the epoch again: the attempt id tells the current attempt from the lost one."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.state, queue.job_status = State.LEASED, JobStatus(State.LEASED, 1, "held")
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        await _settle_down()
        queue.stream(job, chunk("stale"), DONE)
        queue.deliver(Frame(job.id, 1, "held", 0, HEAD | END, chunk("new") + DONE, 200, SSE))
        assert (await answer.done()).body == chunk("new") + DONE
    assert queue.cancelled.empty()


@pytest.mark.parametrize("known", [JobStatus(State.LEASED, 1, "before"), JobStatus(State.LEASED, 2, "other")])
async def test_a_stream_whose_attempt_redis_does_not_know_runs_again(known: JobStatus) -> None:
    """The frames seen contradict what the queue says is running, or are newer: the job is cancelled and run anew."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False, epoch=2)
        queue.state, queue.job_status = State.LEASED, known
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        again = await queue.job()
        assert again.id != job.id
        assert (await queue.cancellation())[0] == job.id
        queue.stream(job, chunk("stale"), first=1, epoch=2)
        queue.stream(again, chunk("a"), chunk("b"))
        body = (await answer.done()).body
    assert body == chunk("a") + chunk("b")


async def test_an_orphaned_job_is_cancelled() -> None:
    """Redis lost that a request was answered, and assigns its job again: the Router cancels it."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT)
        job = await queue.job()
        queue.answer(job, b"1")
        await answer.done()
        for news in (
            Marker(MarkerKind.REQUEUED, job.id, 1 << 20, "its worker was lost"),
            Marker(MarkerKind.LOST, job.id, 1 << 20, "its worker was lost"),
            Frame(job.id, 1 << 20, "b", 0, HEAD, b"", 200, SSE),
        ):
            queue.deliver(news)
            assert (await queue.cancellation())[0] == job.id
        queue.deliver(Frame(job.id, 1 << 20, "b", 1, END, b"x"), Marker(MarkerKind.CANCELLED, job.id, 1, ""))
        await _settle_down()
    assert queue.cancelled.empty()


async def _settle_down() -> None:
    """Let everything that is ready run."""
    for _ in range(10):
        await asyncio.sleep(0)
