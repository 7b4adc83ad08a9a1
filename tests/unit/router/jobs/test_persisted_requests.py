"""Requests with an idempotency key: one job per key, replayed and followed by any number of requests."""

from __future__ import annotations

import asyncio

import pytest

from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    BrokerUnavailable,
    Enqueued,
    Frame,
    IdempotencyKeyReused,
    JobId,
    Marker,
    MarkerKind,
    OutputPage,
    State,
    new_job_id,
)
from router.inference import followers
from router.jobs import persisted_requests as stored
from tests.support.waiting import eventually
from tests.unit.router.fakes import SSE, Client, FakeQueue, router
from tests.unit.router.inference.test_inference import CHAT, DONE, STREAM, chunk

KEY = {"idempotency-key": "order-17"}
REPLAY = "x-inferq-idempotent-replay"


def run_of(
    job_id: JobId, *data: bytes, epoch: int = 1, attempt: str = "a", flags: int = HEAD, end: bool = True
) -> tuple[Frame, ...]:
    """The frames of one attempt."""
    frames = []
    for seq, piece in enumerate(data):
        mark = (flags if seq == 0 else 0) | (END if end and seq == len(data) - 1 else 0)
        head = (200, SSE) if mark & HEAD else (0, "")
        frames.append(Frame(job_id, epoch, attempt, seq, mark, piece, *head))
    return tuple(frames)


def kept(frames: tuple[Frame, ...], state: State = State.DONE) -> OutputPage:
    """All that is kept of a job."""
    last = frames[-1]
    return OutputPage(state, last.epoch, last.attempt_id, (last.epoch, last.seq + 1), frames, complete=True)


@pytest.mark.parametrize("key", ["", "x" * 256, "t\u00e4g", "a\tb"])
async def test_a_malformed_key_is_refused(key: str) -> None:
    """The error names the header and its rule; nothing is queued."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = await Client(app).post(CHAT, headers={"idempotency-key": key}).done()
    assert (answer.status, answer.error["param"]) == (400, "idempotency-key")
    assert "1 to 255 printable" in answer.error["message"]
    assert queue.enqueued.empty()


async def test_a_request_with_a_key_is_a_persisted_job() -> None:
    """It replies to no particular Router, and costs no more calls than any other request; without the header nothing
    changes."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT, headers=KEY)
        job = await queue.job()
        queue.answer(job, b'{"ok": true}')
        await answer.done()
        other = Client(app).post(CHAT)
        unkeyed = await queue.job()
        queue.answer(unkeyed, b"{}")
        await other.done()
    assert (job.persisted, job.idempotency_key, job.reply_to) == (True, "order-17", "")
    assert (unkeyed.persisted, unkeyed.idempotency_key) == (False, "")
    assert unkeyed.reply_to == app.services.link.session_id
    assert (answer.status, answer.body) == (200, b'{"ok": true}')
    assert REPLAY not in answer.headers
    assert queue.attached == []
    assert queue.detached.empty()
    assert len(app.services.requests) == app.services.requests.waiting == 0


async def test_another_request_under_the_key_is_refused() -> None:
    """422, with what to do; the job that has the key is left alone."""
    queue = FakeQueue("m")
    queue.refusal = IdempotencyKeyReused("used for another request", param="idempotency-key")
    async with router(queue) as app:
        answer = await Client(app).post(CHAT, headers=KEY).done()
    assert (answer.status, answer.error["code"]) == (422, "idempotency_key_reused")
    assert answer.error["type"] == "invalid_request_error"
    assert queue.detached.empty()
    assert queue.cancelled.empty()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_persisted_answer_is_replayed(stream: bool) -> None:
    """Whole, in pages, and marked as another request's."""
    queue = FakeQueue("m")
    queue.page_frames = 2
    holder = new_job_id(0)
    queue.holder = Enqueued(holder, State.DONE)
    pieces = [chunk("a"), chunk("b"), chunk("c"), chunk("d"), DONE]
    queue.outputs[holder] = kept(run_of(holder, *pieces))
    async with router(queue) as app:
        answer = await Client(app).post(STREAM if stream else CHAT, headers=KEY).done()
    assert (answer.status, answer.body, answer.headers[REPLAY]) == (200, b"".join(pieces), "true")
    assert [after for _, after in queue.attached] == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert queue.cancelled.empty()


async def test_a_request_joins_a_running_stream() -> None:
    """It reads the persisted output, and continues with what came meanwhile, without a gap or a repeat."""
    queue = FakeQueue("m")
    holder = new_job_id(0)
    queue.holder = Enqueued(holder, State.LEASED)
    run = run_of(holder, chunk("a"), chunk("b"), chunk("c"), chunk("d"), DONE)
    queue.outputs[holder] = kept(run[:2], State.LEASED)
    queue.attach_allowed.clear()
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        await eventually(lambda: queue.attached, "it reads", every_s=0.001)
        queue.deliver(run[1], run[2])
        queue.attach_allowed.set()
        await answer.until(lambda: answer.body.endswith(chunk("c")))
        queue.deliver(*run[3:])
        await answer.done()
    assert answer.body == b"".join(frame.data for frame in run)
    assert len(queue.attached) == 1


async def test_requests_of_one_router_share_a_job() -> None:
    """Frames come once and reach all; one client that leaves affects no other, and when the last leaves the job is not
    cancelled, but this Router detaches from it."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        first = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        queue.outputs[job.id] = kept(run_of(job.id, chunk("a"), end=False), State.LEASED)
        queue.stream(job, chunk("a"), end=False)
        await first.until(lambda: first.body == chunk("a"))
        queue.holder = Enqueued(job.id, State.LEASED)
        queue.outputs[job.id] = kept(run_of(job.id, chunk("a"), attempt="a1", end=False), State.LEASED)
        others = [Client(app).post(STREAM, headers=KEY) for _ in range(3)]
        for other in others:
            await other.until(lambda other=other: other.body == chunk("a"))  # type: ignore[misc]
        assert app.services.requests.waiting == 4
        others[0].client.gone.set()
        await others[0].done()
        queue.stream(job, chunk("b"), end=False, first=1)
        for answer in (first, *others[1:]):
            await answer.until(lambda answer=answer: answer.body == chunk("a") + chunk("b"))  # type: ignore[misc]
        assert queue.detached.empty()
        for answer in (first, *others[1:]):
            answer.client.gone.set()
            await answer.done()
        async with asyncio.timeout(5):
            assert await queue.detached.get() == job.id
    assert queue.cancelled.empty()


async def test_lost_frames_are_read_from_the_persisted_output() -> None:
    """A gap costs one read from its position, and no other run of the job."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        run = run_of(job.id, chunk("a"), chunk("b"), chunk("c"), DONE, attempt="a1")
        queue.outputs[job.id] = kept(run)
        queue.deliver(run[0], run[2])
        await answer.done()
    assert answer.body == b"".join(frame.data for frame in run)
    assert queue.attached == [(job.id, (1, 0))]
    assert queue.enqueued.empty()


async def test_a_router_reads_what_was_lost_with_its_reply_stream() -> None:
    """It attaches again, and continues from its position."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        run = run_of(job.id, chunk("a"), chunk("b"), DONE, attempt="a1")
        queue.deliver(run[0])
        await answer.until(lambda: answer.body == chunk("a"))
        queue.outputs[job.id] = kept(run)
        queue.lose_replies()
        await answer.done()
    assert answer.body == b"".join(frame.data for frame in run)
    assert queue.attached == [(job.id, (1, 0))]


async def test_a_job_that_the_queue_lost_is_queued_again_by_its_id() -> None:
    """What the client has is compared with the new run, and not sent again."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        queue.deliver(*run_of(job.id, chunk("a"), chunk("b"), end=False))
        await answer.until(lambda: answer.body == chunk("a") + chunk("b"))
        queue.lose_replies()
        again = await queue.job()
        assert (again.id, again.idempotency_key) == (job.id, job.idempotency_key)
        assert again.ttl_ms <= job.ttl_ms
        queue.deliver(*run_of(job.id, chunk("a", "two"), chunk("b", "two"), chunk("c", "two"), DONE, attempt="new"))
        await answer.done()
    assert answer.body == chunk("a") + chunk("b") + chunk("c") + DONE


@pytest.mark.parametrize("heard", [False, True], ids=["reading behind", "marker heard before"])
@pytest.mark.parametrize("name", ["a1", "b1"], ids=["its end lost", "another attempt since"])
async def test_nothing_continues_behind_frames_that_redis_lost(heard: bool, name: str) -> None:
    """Redis lost the end of what the client has, and another attempt continued behind the rest before this Router
    looked: the client has the text once all the same."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        had = run_of(job.id, chunk("a"), chunk("b"), chunk("c"), end=False, attempt="a1")
        queue.deliver(*had)
        await answer.until(lambda: answer.body == chunk("a") + chunk("b") + chunk("c"))
        if heard:
            queue.mark(job, MarkerKind.REQUEUED, epoch=2)
        left = run_of(job.id, chunk("a"), chunk("b"), end=False, attempt=name)
        rest = run_of(job.id, chunk("c"), chunk("d"), DONE, epoch=2, attempt="c", flags=HEAD | CONTINUED)
        queue.outputs[job.id] = kept((*left, *rest))
        queue.lose_replies()
        await answer.done()
    assert answer.body == chunk("a") + chunk("b") + chunk("c") + chunk("d") + DONE


async def test_a_lost_job_whose_key_has_another_job_follows_that_job() -> None:
    """Another request with the key came before this Router noticed: there is one job all the same."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT, headers=KEY)
        await queue.job()
        new = new_job_id(0)
        queue.holder = Enqueued(new, State.LEASED)
        queue.outputs[new] = kept(run_of(new, b'{"ok": 1}'))
        queue.lose_replies()
        await answer.done()
    assert answer.body == b'{"ok": 1}'


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        (State.CANCELLED, 499, "cancelled"),
        (State.EXPIRED, 504, "deadline_exceeded"),
        (State.DEAD, 502, "attempts_exhausted"),
    ],
)
async def test_a_job_that_ended_without_an_answer_is_an_error(state: State, status: int, code: str) -> None:
    """Every follower gets the error, whether the marker reached this Router or not."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        told, asks = Client(app).post(CHAT, headers=KEY), Client(app).post(CHAT, headers=KEY)
        first, second = await queue.job(), await queue.job()
        queue.mark(first, MarkerKind(state))
        queue.outputs[second.id] = OutputPage(state, 1, "", (0, 0), (), complete=True)
        queue.lose_replies()
        for answer in (told, asks):
            await answer.done()
            assert (answer.status, answer.error["code"]) == (status, code)
    assert queue.cancelled.empty()


async def test_a_silent_job_is_read_again() -> None:
    """Should this Router not be sent what it waits for, for any reason, it reads it."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50) as app:
        answer = Client(app).post(CHAT, headers=KEY)
        job = await queue.job()
        queue.outputs[job.id] = kept(run_of(job.id, b'{"ok": 1}'))
        await answer.done()
    assert answer.body == b'{"ok": 1}'


async def test_a_request_for_a_persisted_job_outlasts_an_outage_of_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its own deadline, however long Redis is away."""
    monkeypatch.setattr(stored, "READ_AGAIN_S", 0.01)
    queue = FakeQueue("m")
    queue.attach_refusals = [BrokerUnavailable("Redis is away"), BrokerUnavailable("Redis is away")]
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        run = run_of(job.id, chunk("a"), chunk("b"), DONE, attempt="a1")
        queue.deliver(run[0])
        await answer.until(lambda: answer.body == chunk("a"))
        queue.outputs[job.id] = kept(run)
        queue.lose_replies()
        await answer.done()
        late = Client(app).post(CHAT, headers=KEY | {"x-inferq-deadline-ms": "50"})
        job = await queue.job()
        queue.attach_refusals = [BrokerUnavailable("Redis is away")] * 100_000
        queue.lose_replies()
        await late.done()
    assert answer.body == b"".join(frame.data for frame in run)
    assert (late.status, late.error["code"]) == (504, "deadline_exceeded")
    assert "while Redis did not answer" in late.error["message"]


async def test_a_slow_reader_of_a_persisted_stream_loses_nothing() -> None:
    """What it does not take in time is read again from the persisted output, and takes no memory of the Router."""
    queue = FakeQueue("m")
    async with router(queue, max_client_buffer_bytes=16 * 1024) as app:
        client = Client(app)
        answer = client.post(STREAM, headers=KEY)
        job = await queue.job()
        run = run_of(job.id, *[chunk("x" * 9_000) for _ in range(20)], DONE, attempt="a1")
        queue.outputs[job.id] = kept(run)
        client.reading.clear()
        for frame in run:
            queue.deliver(frame)
            await asyncio.sleep(0)
        (request,) = app.services.requests.now_open()
        assert request.merger is not None
        assert request.merger.pending_bytes < 40_000
        client.reading.set()
        await answer.done()
    assert answer.body == b"".join(frame.data for frame in run)
    assert queue.attached


async def test_the_live_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound another page is read instead."""
    monkeypatch.setattr(followers, "MAX_BUFFERED_FRAMES", 2)
    queue = FakeQueue("m")
    holder = new_job_id(0)
    queue.holder = Enqueued(holder, State.LEASED)
    run = run_of(holder, *[chunk(str(number)) for number in range(6)], DONE)
    queue.outputs[holder] = kept(run[:1], State.LEASED)
    queue.attach_allowed.clear()
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        await eventually(lambda: queue.attached, "it reads", every_s=0.001)
        queue.deliver(*run[1:5])
        (request,) = app.services.requests.now_open()
        assert not request.live_buffer
        queue.attach_allowed.set()
        queue.outputs[holder] = kept(run)
        await answer.done()
    assert answer.body == b"".join(frame.data for frame in run)


async def test_output_with_a_gap_is_an_error() -> None:
    """If frames are neither sent nor persisted, the client gets an error: nothing is spliced."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        run = run_of(job.id, chunk("a"), chunk("b"), chunk("c"), DONE, attempt="a1")
        queue.outputs[job.id] = kept((run[0], *run[2:]))
        queue.deliver(run[0], run[2])
        await answer.done()
    assert answer.body.startswith(chunk("a"))
    assert b"stream_broken" in answer.body
    assert b"kept" in answer.body
    assert chunk("c") not in answer.body


@pytest.mark.parametrize("live", [False, True], ids=["late", "live"])
async def test_a_persisted_stream_continues_however_long_it_is(live: bool) -> None:
    """Nothing has to be compared: the persisted output is read whole, though no Router remembers so much of a
    stream."""
    queue = FakeQueue("m")
    holder = new_job_id(0)
    queue.holder = Enqueued(holder, State.QUEUED if live else State.DONE)
    said = [chunk("x" * 500) for _ in range(300)]
    lost = run_of(holder, *said, end=False)
    rest = run_of(holder, chunk("a time", "two"), DONE, epoch=2, attempt="b", flags=HEAD | CONTINUED)
    if not live:
        queue.outputs[holder] = kept((*lost, *rest))
    async with router(queue, max_replay_bytes=0) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        if live:
            queue.outputs[holder] = kept(lost, State.LEASED)
            await answer.until(lambda: answer.body == b"".join(said))
            queue.deliver(Marker(MarkerKind.REQUEUED, holder, 2, "its worker was lost"), *rest)
        await answer.done()
    assert answer.body == b"".join(said) + chunk("a time") + DONE


async def test_a_persisted_stream_too_long_to_compare_is_not_spliced() -> None:
    """An attempt that begins anew could say something else: the client gets an error."""
    queue = FakeQueue("m")
    async with router(queue, max_replay_bytes=0) as app:
        answer = Client(app).post(STREAM, headers=KEY)
        job = await queue.job()
        queue.deliver(*run_of(job.id, chunk("a"), end=False))
        await answer.until(lambda: answer.body == chunk("a"))
        queue.mark(job, MarkerKind.REQUEUED, epoch=2)
        queue.deliver(*run_of(job.id, chunk("a"), chunk("b"), DONE, epoch=2, attempt="b"))
        await answer.done()
    assert answer.body.startswith(chunk("a"))
    assert b"stream_broken" in answer.body
    assert chunk("b") not in answer.body


async def test_a_continued_stream_is_read_as_one() -> None:
    """A late client reads both attempts' frames as one answer: the second continues where the first was lost."""
    queue = FakeQueue("m")
    holder = new_job_id(0)
    queue.holder = Enqueued(holder, State.DONE)
    lost = run_of(holder, chunk("Once "), chunk("upon "), end=False)
    rest = run_of(holder, chunk("a time", "two"), DONE, epoch=2, attempt="b", flags=HEAD | CONTINUED)
    queue.outputs[holder] = kept((*lost, *rest))
    async with router(queue) as app:
        answer = await Client(app).post(STREAM, headers=KEY).done()
    assert answer.body == chunk("Once ") + chunk("upon ") + chunk("a time") + DONE
