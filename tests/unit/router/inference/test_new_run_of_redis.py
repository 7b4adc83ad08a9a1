"""Another run of Redis, which may have lost its latest writes: what the Router makes of what it hears then."""

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
async def test_an_attempt_that_redis_forgot_is_not_taken_for_that_of_the_new_run(body: dict[str, Any]) -> None:
    """A worker still puts out what the server lost: its frames do not count, those of the next attempt do."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(body)
        job = await queue.job()
        queue.standing = JobStatus(State.QUEUED, 1 << 20, "")
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        await _settle_down()
        queue.stream(job, chunk("stale"), end=False)
        queue.stream(job, chunk("new"), DONE, epoch=1 << 20)
        assert (await answer.done()).body == chunk("new") + DONE


async def test_of_two_attempts_of_one_epoch_the_one_that_redis_knows_counts() -> None:
    """The new run of Redis gave the epoch out again: the attempt id tells who holds the job from who was lost."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.state, queue.standing = State.LEASED, JobStatus(State.LEASED, 1, "held")
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        await _settle_down()
        queue.stream(job, chunk("stale"), DONE)
        queue.deliver(Frame(job.id, 1, "held", 0, HEAD | END, chunk("new") + DONE, 200, SSE))
        assert (await answer.done()).body == chunk("new") + DONE
    assert queue.cancelled.empty()


@pytest.mark.parametrize("known", [JobStatus(State.LEASED, 1, "before"), JobStatus(State.LEASED, 2, "other")])
async def test_a_stream_whose_attempt_redis_does_not_know_runs_again(known: JobStatus) -> None:
    """What was heard is not what the queue says runs, or is newer than that: the job is cancelled and made anew."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False, epoch=2)
        queue.state, queue.standing = State.LEASED, known
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        again = await queue.job()
        assert again.id != job.id
        assert (await queue.cancellation())[0] == job.id
        queue.stream(job, chunk("stale"), first=1, epoch=2)
        queue.stream(again, chunk("a"), chunk("b"))
        body = (await answer.done()).body
    assert body == chunk("a") + chunk("b")


async def test_a_job_that_runs_for_nobody_is_cancelled() -> None:
    """Redis lost that a request was answered, and gives its job out again: the Router says that nobody waits."""
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
