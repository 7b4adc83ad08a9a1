"""Persisted jobs as the Router's features use them: queued, followed by many, shown, cancelled and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from queue_schemas import (
    END,
    HEAD,
    AttemptsExhausted,
    BadRequest,
    DeadlineExceeded,
    Frame,
    InferqError,
    Job,
    JobCancelled,
    JobNotFound,
    Lane,
    MarkerKind,
    ModelNotFound,
    OutputPage,
    OverCapacity,
    Pool,
    ShuttingDown,
    State,
    Tenant,
    new_job_id,
)
from router.inference.request_fields import read_fields
from router.jobs.service import JobOutput, JobService
from tests.support.waiting import eventually
from tests.unit.router.fakes import SSE, Client, FakeQueue, router

ACME, RIVAL = Tenant("acme"), Tenant("rival")
CHAT = b'{"model": "m", "stream": true, "messages": [], "stream_options": {"include_usage": true}, "n": 2}'
PATH = "/v1/chat/completions"


@asynccontextmanager
async def persisted_jobs(queue: FakeQueue, **settings: Any) -> AsyncIterator[JobService]:
    async with router(queue, **settings) as app:
        yield app.services.jobs


async def queued(jobs: JobService, queue: FakeQueue, body: bytes = CHAT) -> Job:
    """A background job of ACME's."""
    fields = read_fields(body, "application/json", PATH)
    job = Job(
        id=new_job_id(0), tenant=ACME, model=Pool("m"), path=PATH, body=body, stream=fields.stream, persisted=True,
        lane=Lane.BACKGROUND, request_id="r1",
    )  # fmt: skip
    found = await jobs.enqueue(job, fields, notify="response", note=b"mine")
    assert found.job_id == (await queue.job()).id
    return job


def frames(job: Job, *pieces: bytes, end: bool = False, status: int = 200, kind: str = SSE) -> tuple[Frame, ...]:
    """The output of one attempt."""
    made = []
    for seq, data in enumerate(pieces):
        flags = (HEAD if seq == 0 else 0) | (END if end and seq == len(pieces) - 1 else 0)
        made.append(Frame(job.id, 1, "a1", seq, flags, data, *((status, kind) if flags & HEAD else (0, ""))))
    return tuple(made)


def output_so_far(job: Job, *pieces: bytes, state: State = State.LEASED, cause: str = "", **options: Any) -> OutputPage:
    run = frames(job, *pieces, **options)
    return OutputPage(
        state,
        1,
        "" if state in (State.DEAD, State.CANCELLED, State.EXPIRED) else "a1",
        (1, len(run)),
        run,
        complete=True,
        cause=cause,
    )


async def read(output: JobOutput) -> bytes:
    """All of it, to its end."""
    return b"".join([piece async for piece in output])


async def test_a_background_request_is_a_persisted_job_of_its_lane() -> None:
    """Kept for the time that the settings say, listed, with all that is needed to relay its answer again."""
    queue = FakeQueue("m")
    background = {"x-inferq-background": "true"}
    async with router(queue, background_retention_ms=5_000, background_deadline_ms=70_000) as app:
        client = Client(app)
        accepted = await client.post(CHAT, PATH, background).done()
        job = await queue.job()
        assert (accepted.status, accepted.json()["id"]) == (202, job.id)
        assert (job.persisted, job.lane, job.reply_to, job.ttl_ms) == (True, Lane.BACKGROUND, "", 70_000)
        options = queue.persist_options[job.id]
        assert (options.retention_ms, options.background, options.topic) == (5_000, True, "")
        job_metadata = options.metadata
        assert (job_metadata.path, job_metadata.stream, job_metadata.include_usage, job_metadata.choices) == (
            PATH, True, True, 2,
        )  # fmt: skip
        assert not job_metadata.resumable
        assert (await client.post(b'{"model": "other"}', PATH, background).done()).status == ModelNotFound.status
        assert (await client.post(b"no JSON", PATH, background).done()).status == BadRequest.status
        app.services.lifecycle.draining = True
        refused = await client.post(CHAT, PATH, background).done()
        assert (refused.status, refused.error["code"]) == (ShuttingDown.status, ShuttingDown.code)
        app.services.lifecycle.draining = False


async def test_a_job_carries_the_note_and_topic_of_its_feature() -> None:
    """So the feature that queued it recognises it later, and is notified of its end."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue)
        assert (queue.persist_options[job.id].topic, queue.persist_options[job.id].metadata.note) == (
            "response",
            b"mine",
        )


async def test_many_follow_one_job_from_its_beginning_each_at_its_pace() -> None:
    """A late reader reads the persisted output first; all get the same; when they are gone the queue is told, and
    nothing is left here."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue)
        pieces = [b"data: %d\n\n" % number for number in range(6)]
        queue.outputs[job.id] = output_so_far(job, *pieces[:2])
        async with jobs.follow(ACME, job.id) as early:
            assert await anext(early) == b"".join(pieces[:2])
            assert (early.head and early.head.status, early.job.id) == (200, job.id)
            queue.stream(job, *pieces[2:4], end=False, first=2)
            assert await anext(early) == b"".join(pieces[2:4])
            queue.outputs[job.id] = output_so_far(job, *pieces[:4])
            async with jobs.follow(ACME, job.id) as late:
                assert await anext(late) == b"".join(pieces[:4])
                queue.stream(job, *pieces[4:], first=4)
                queue.outputs[job.id] = output_so_far(job, *pieces, end=True, state=State.DONE)
                assert await read(late) == b"".join(pieces[4:])
            assert await read(early) == b"".join(pieces[4:])
            async with jobs.follow(ACME, job.id) as after:
                assert await read(after) == b"".join(pieces)
        async with jobs.follow(ACME, job.id) as left:
            assert await anext(left)
        assert len(jobs._requests) == 0
        assert len(jobs._requests.followers) == 0


async def test_a_plain_answer_comes_at_its_end() -> None:
    """With its status and content type; an engine's error is an answer like any other."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue, b'{"model": "m"}')
        queue.outputs[job.id] = output_so_far(
            job, b'{"error": 1}', end=True, state=State.FAILED, status=400, kind="application/json"
        )
        async with jobs.follow(ACME, job.id) as followed:
            assert await read(followed) == b'{"error": 1}'
            assert followed.head is not None
            assert (followed.head.status, followed.head.is_json) == (400, True)


@pytest.mark.parametrize(
    ("state", "error"),
    [(State.DEAD, AttemptsExhausted), (State.CANCELLED, JobCancelled), (State.EXPIRED, DeadlineExceeded)],
)
@pytest.mark.parametrize("said", [(), (b"data: half\n\n",)])
async def test_an_end_without_an_answer_is_an_error_behind_the_output(
    state: State, error: type[InferqError], said: tuple[bytes, ...]
) -> None:
    """With its cause, whether it is read afterwards or followed live."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue)
        queue.outputs[job.id] = output_so_far(job, *said, state=state, cause="of what happened")
        async with jobs.follow(ACME, job.id) as followed:
            if said:
                assert await anext(followed) == said[0]
            with pytest.raises(error, match="of what happened"):
                await anext(followed)
        queue.outputs[job.id] = output_so_far(job, *said)
        async with jobs.follow(ACME, job.id) as live:
            if said:
                assert await anext(live) == said[0]
            waiting = asyncio.ensure_future(anext(live))
            await eventually(lambda: not live._request.catching_up, "it has caught up")
            queue.mark(job, MarkerKind(state.value), reason="of what happened")
            with pytest.raises(error, match="of what happened"):
                await waiting


async def test_silence_yields_an_empty_piece_and_a_lost_job_ends() -> None:
    """An error once the queue has no such job any more."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue, keepalive_interval_ms=50) as jobs:
        job = await queued(jobs, queue)
        queue.outputs[job.id] = output_so_far(job)
        async with jobs.follow(ACME, job.id) as followed:
            assert await anext(followed) == b""
            del queue.outputs[job.id]
            with pytest.raises(JobNotFound, match="not kept any more"):
                assert await read(followed) == b""


async def test_a_slow_follower_takes_no_memory() -> None:
    """Live frames past its buffer are left on the queue, and read from there when it continues."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue, max_client_buffer_bytes=16 * 1024) as jobs:
        job = await queued(jobs, queue)
        queue.outputs[job.id] = output_so_far(job)
        pieces = [b"data: " + b"x" * 4_000 + b"\n\n" for _ in range(40)]
        async with jobs.follow(ACME, job.id) as followed:
            waiting = asyncio.ensure_future(anext(followed))
            await eventually(lambda: not followed._request.catching_up, "it has caught up")
            queue.stream(job, *pieces, end=True)
            queue.outputs[job.id] = output_so_far(job, *pieces, end=True, state=State.DONE)
            merger = followed._request.merger
            assert merger is not None
            assert merger.pending_bytes < 32 * 1024
            assert await waiting + await read(followed) == b"".join(pieces)


async def test_another_tenants_job_is_not_found() -> None:
    """As a job that never existed: on every operation, with the same error."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue)
        for tenant, job_id in ((RIVAL, job.id), (ACME, job.id[:-1] + "x"), (ACME, "no id")):
            assert await jobs.get(tenant, job_id) is None
            assert await jobs.cancel(tenant, job_id) is None
            assert not await jobs.delete(tenant, job_id)
            with pytest.raises(JobNotFound, match="there is no job"):
                async with jobs.follow(tenant, job_id):
                    pass
        assert queue.cancelled.empty()
        assert (await jobs.get(ACME, job.id)) == queue.persisted[job.id]
        assert await jobs.delete(ACME, job.id)
        assert await jobs.get(ACME, job.id) is None


async def test_cancelling_returns_the_job_as_it_is_then() -> None:
    """One that has ended is left as it is."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue) as jobs:
        job = await queued(jobs, queue)
        assert await jobs.cancel(ACME, job.id) is not None
        assert (await queue.cancellation()) == (job.id, "it was cancelled on demand")
        queue.persisted[job.id] = replace(queue.persisted[job.id], state=State.DONE)
        ended = await jobs.cancel(ACME, job.id)
        assert ended is not None
        assert ended.state is State.DONE
        assert queue.cancelled.empty()


async def test_followers_count_as_open_requests() -> None:
    """Past the limit one is refused, and costs nothing."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue, max_concurrent_requests=1) as jobs:
        job = await queued(jobs, queue)
        queue.outputs[job.id] = output_so_far(job)
        async with jobs.follow(ACME, job.id):
            with pytest.raises(OverCapacity):
                async with jobs.follow(ACME, job.id):
                    pass
        assert len(jobs._requests) == 0


async def test_a_follower_that_catches_up_gets_the_end_after_the_output() -> None:
    """A cancelled job has no attempt any more: what was read of it is still the beginning of its output."""
    queue = FakeQueue("m")
    async with persisted_jobs(queue, keepalive_interval_ms=50) as jobs:
        job = await queued(jobs, queue)
        queue.outputs[job.id] = output_so_far(job, b"data: 1\n\n")
        async with jobs.follow(ACME, job.id) as followed:
            assert await anext(followed) == b"data: 1\n\n"
            queue.outputs[job.id] = output_so_far(
                job, b"data: 1\n\n", b"data: 2\n\n", state=State.CANCELLED, cause="so"
            )
            pieces = []
            with pytest.raises(JobCancelled, match="so"):
                while True:
                    pieces.append(await anext(followed))
            assert b"".join(pieces) == b"data: 2\n\n"
