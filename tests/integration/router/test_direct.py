"""Requests that are answered without a task, over raw sockets: from callbacks, until something must be waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
import pytest

from queue_schemas import END, HEAD, BrokerFull, Frame, InferqError, Job, MarkerKind, OverCapacity
from tests.support.queue import MODEL
from tests.support.sockets import RawClient
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue

from .harness import SSE, fake_router

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
HALF = orjson.dumps(CHAT)[:20]
AS_ASGI = "Content-Encoding: identity"
"""What makes a request one that is served as ASGI, and changes nothing else."""
BOTH_WAYS = pytest.mark.parametrize("way", [(), (AS_ASGI,)], ids=["direct", "asgi"])


def post(fields: object, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    body = fields if isinstance(fields, bytes) else orjson.dumps(fields)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "X-Request-Id: mine", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def event(text: str) -> bytes:
    chunk = {
        "id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }  # fmt: skip
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def tasks_of_requests() -> int:
    return sum(task.get_coro().__qualname__ == "RequestCycle.run" for task in asyncio.all_tasks())  # type: ignore[union-attr]


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue(MODEL)


async def test_a_plain_request_has_no_task(queue: FakeQueue) -> None:
    """From the end of its body to the end of its answer."""
    async with fake_router(queue) as port, RawClient.to(port) as client:
        for number in range(2):
            await client.send(post(CHAT))
            job = await queue.job()
            await asyncio.sleep(0)
            assert tasks_of_requests() == 0
            queue.answer(job, b'{"n": %d}' % number)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b'{"n": %d}' % number)
            assert answer.headers["x-request-id"] == "mine"


async def test_a_stream_is_written_as_it_comes_without_a_task(queue: FakeQueue) -> None:
    """Each piece at once; comments meanwhile; its end ends the answer and not the connection."""
    async with fake_router(queue, keepalive_interval_ms=60) as port, RawClient.to(port) as client:
        await client.send(post(STREAM))
        job = await queue.job()
        await client.reader.readuntil(b": queued\n")
        queue.deliver(Frame(job.id, 1, "a", 0, HEAD, event("one"), 200, SSE))
        await client.reader.readuntil(event("one"))
        queue.deliver(Frame(job.id, 1, "a", 1, 0, event("two")))
        await client.reader.readuntil(event("two"))
        assert tasks_of_requests() == 0
        queue.deliver(Frame(job.id, 1, "a", 2, END, b"data: [DONE]\n\n"))
        await client.reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await client.send(post(CHAT))
        queue.answer(await queue.job(), b"{}")
        assert (await client.answer()).body == b"{}"


Answer = Callable[[FakeQueue, Job], None]


def plain(queue: FakeQueue, job: Job) -> None:
    queue.answer(job, b'{"id": "c1"}')


def refused_by_engine(queue: FakeQueue, job: Job) -> None:
    queue.answer(job, b'{"detail": "no"}', status=422)


def with_headers(queue: FakeQueue, job: Job) -> None:
    headers = {"retry-after": "3", "x-should-retry": "false"}
    queue.deliver(Frame(job.id, 1, "a", 0, HEAD | END, b"{}", 503, "application/json", headers))


def without_body(queue: FakeQueue, job: Job) -> None:
    queue.answer(job, b"never sent", status=204)


def streamed(queue: FakeQueue, job: Job) -> None:
    queue.stream(job, event("one"), event("two"), b"data: [DONE]\n\n")


def odd_events(queue: FakeQueue, job: Job) -> None:
    queue.stream(job, b": hello\n\n", b"data: a\r\ndata: b\r\n\r\n", b'data: {"error": {"message": "x"}}\n\n')


def expired(queue: FakeQueue, job: Job) -> None:
    queue.mark(job, MarkerKind.EXPIRED, 1, "its deadline passed")


def broken(queue: FakeQueue, job: Job) -> None:
    queue.stream(job, event("one"), end=False)
    queue.mark(job, MarkerKind.DEAD, 2, "its worker died")


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        (CHAT, plain), (CHAT, refused_by_engine), (CHAT, with_headers), (CHAT, without_body), (CHAT, expired),
        (STREAM, streamed), (STREAM, odd_events), (STREAM, refused_by_engine), (STREAM, expired), (STREAM, broken),
    ],
)  # fmt: skip
async def test_the_answer_is_the_same_as_over_asgi(queue: FakeQueue, fields: dict[str, object], answer: Answer) -> None:
    """Head and body, whatever it is, with a deadline that names the same cause."""
    answers = []
    async with fake_router(queue) as port:
        for headers in ((), (AS_ASGI,)):
            async with RawClient.to(port) as client:
                await client.send(post(fields, *headers))
                answer(queue, await queue.job())
                got = await client.answer()
                assert got.status != 204 or "content-length" not in got.headers
                for name in ("date", "content-length", "transfer-encoding"):
                    got.headers.pop(name, None)  # what has come at once is one piece, and may be all
                answers.append(got)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"{"), 400), (post(b""), 400), (post({"model": "unknown"}), 404), (post(b"x" * 3_000), 413),
        (post(CHAT, "X-Inferq-Deadline-Ms: never"), 400), (post(CHAT, "Content-Type: \x7f"), 400),
    ],
)  # fmt: skip
async def test_a_refusal_leaves_nothing_behind(queue: FakeQueue, request_bytes: bytes, status: int) -> None:
    """It is told once, and takes no room."""
    async with fake_router(queue, max_concurrent_requests=1, max_body_bytes=2_000) as port:
        for _ in range(3):
            async with RawClient.to(port) as client:
                await client.send(request_bytes)
                assert (await client.answer()).status == status
        async with RawClient.to(port) as client:
            await client.send(post(CHAT))
            queue.answer(await queue.job(), b"{}")
            assert (await client.answer()).status == 200
    assert queue.enqueued.empty()


@pytest.mark.parametrize(("refusal", "status"), [(OverCapacity("full"), 429), (BrokerFull("full"), 503)])
async def test_a_job_that_the_queue_refuses_is_not_cancelled(
    queue: FakeQueue, refusal: InferqError, status: int
) -> None:
    """There is none."""
    queue.refusal = refusal
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT))
        assert (await client.answer()).status == status
        queue.refusal = None
        await client.send(post(CHAT))
        queue.answer(await queue.job(), b"{}")
        assert (await client.answer()).status == 200
    assert queue.cancelled.empty()


@BOTH_WAYS
async def test_a_bug_in_the_queue_is_told_at_once(queue: FakeQueue, way: tuple[str, ...]) -> None:
    """Not when the deadline passes."""
    queue.refusal = ValueError("a bug")
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT, *way))
        answer = await client.answer()
        assert answer.status == 500 and b"the log has it under mine" in answer.body


@asynccontextmanager
async def asking_a_slow_queue(queue: FakeQueue, way: tuple[str, ...]) -> AsyncIterator[RawClient]:
    """A client whose job is on its way to the queue, which has not answered."""
    queue.hold_enqueue = True
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT, *way))
        await eventually(lambda: queue.enqueues, "the job is on its way to the queue")
        yield client


@BOTH_WAYS
async def test_a_queue_that_closes_ends_the_request(queue: FakeQueue, way: tuple[str, ...]) -> None:
    """Its calls under way are cancelled: the client is told to try again."""
    async with asking_a_slow_queue(queue, way) as client:
        for enqueued in tuple(queue.enqueues):
            enqueued.cancel()
        answer = await client.answer()
        assert answer.status == 503 and b"connection to the queue was closed" in answer.body


@BOTH_WAYS
async def test_replies_lost_before_the_queue_answers(queue: FakeQueue, way: tuple[str, ...]) -> None:
    """The queue's answer is waited for first, and told if it is an error; the job is asked for again after it."""
    async with asking_a_slow_queue(queue, way) as client:
        queue.lose_replies()
        await asyncio.sleep(0.05)
        assert len(queue.enqueues) == 1
        queue.refusal = OverCapacity("full")
        queue.enqueues_released.set()
        assert (await client.answer()).status == 429
        queue.refusal = None
        queue.enqueues_released.clear()
        await client.send(post(CHAT, *way))
        await eventually(lambda: queue.enqueues, "the job is on its way to the queue")
        queue.lose_replies()
        queue.enqueues_released.set()
        assert (await queue.job()).id == (await queue.job()).id


async def test_no_comment_begins_an_answer_that_may_still_be_refused(queue: FakeQueue) -> None:
    """The queue is slow to say that it is full: the client is told by the status."""
    queue.hold_enqueue = True
    async with fake_router(queue, keepalive_interval_ms=50) as port, RawClient.to(port) as client:
        await client.send(post(STREAM))
        await asyncio.sleep(0.2)
        queue.refusal = OverCapacity("full")
        queue.enqueues_released.set()
        assert (await client.answer()).status == 429


async def test_a_queue_that_is_silent_ends_the_request_at_its_deadline(queue: FakeQueue) -> None:
    """The enqueue is never answered: whether the job is on the queue is unknown, so it is cancelled."""
    queue.hold_enqueue = True
    async with fake_router(queue, deadline_grace_ms=10_000) as port, RawClient.to(port) as client:
        await client.send(post(CHAT, "X-Inferq-Deadline-Ms: 100"))
        answer = await client.answer()
        assert answer.status == 504 and b"Redis did not answer" in answer.body
        await queue.cancellation()


@pytest.mark.parametrize("fields", [CHAT, STREAM])
@pytest.mark.parametrize("held", [False, True])
async def test_a_client_that_goes_has_its_job_cancelled(
    queue: FakeQueue, fields: dict[str, object], held: bool
) -> None:
    """Before and after the queue has answered; what comes late is dropped."""
    queue.hold_enqueue = held
    async with fake_router(queue) as port:
        async with RawClient.to(port) as client:
            await client.send(post(fields))
            if held:
                await asyncio.sleep(0.05)
            else:
                await queue.job()
        job_id, reason = await queue.cancellation()
        assert reason == "its client went away"
        queue.deliver(Frame(job_id, 1, "a", 0, HEAD | END, b"{}", 200, "application/json"))
        await eventually(lambda: tasks_of_requests() == 0, "the request is over")


async def test_a_client_that_reads_slowly_is_waited_for(queue: FakeQueue) -> None:
    """A task goes on then, and the client gets every byte in order."""
    pieces = [event(f"{number} " + "x" * 8_000) for number in range(1_000)]
    async with (
        fake_router(queue, max_client_buffer_bytes=64 << 20) as port,
        RawClient.to(port, receive_buffer_bytes=4096) as client,
    ):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(STREAM))
        job = await queue.job()
        for seq, piece in enumerate(pieces):
            queue.deliver(Frame(job.id, 1, "a", seq, 0 if seq else HEAD, piece, 200 if not seq else 0, SSE))
            await asyncio.sleep(0)
        assert tasks_of_requests() == 1
        queue.deliver(Frame(job.id, 1, "a", len(pieces), END, b"data: [DONE]\n\n"))
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert answer.body == b"".join(pieces) + b"data: [DONE]\n\n"


async def test_a_lost_stream_goes_on_behind_its_text(queue: FakeQueue) -> None:
    """The queue is told what was delivered, and the client sees one answer."""
    async with fake_router(queue, on_loss="continue") as port, RawClient.to(port) as client:
        await client.send(post(STREAM))
        job = await queue.job()
        queue.stream(job, event("one "), end=False)
        await client.reader.readuntil(event("one "))
        queue.mark(job, MarkerKind.LOST, 2)
        async with asyncio.timeout(5):
            resumed, epoch = await queue.resumed.get()
        assert (resumed.prefix, epoch) == ("one ", 2)


async def test_lost_replies_are_asked_for_again(queue: FakeQueue) -> None:
    """A job whose frames may be lost is queued again under its id, and answered."""
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT))
        job = await queue.job()
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        queue.answer(job, b"{}", epoch=2)
        assert (await client.answer()).status == 200


async def test_a_pipelined_request_waits_for_the_one_before(queue: FakeQueue) -> None:
    """Both arrived with one read; the second is queued once the first is answered."""
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT) + post(STREAM) + post(b"{"))
        first = await queue.job()
        await asyncio.sleep(0.05)
        assert queue.enqueued.empty()
        queue.answer(first, b"{}")
        assert (await client.answer()).body == b"{}"
        streamed(queue, await queue.job())
        assert (await client.answer()).body.endswith(b"[DONE]\n\n")
        assert (await client.answer()).status == 400


@pytest.mark.parametrize("cut", [1, 90, len(post(CHAT)) - 1])
async def test_a_request_that_comes_in_pieces_is_answered_too(queue: FakeQueue, cut: int) -> None:
    """By a task where its body was not there when its head was."""
    data = post(CHAT)
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(data[:cut])
        await asyncio.sleep(0.05)
        await client.send(data[cut:])
        queue.answer(await queue.job(), b"{}")
        assert (await client.answer()).body == b"{}"


async def test_a_body_that_is_asked_for_is_waited_for(queue: FakeQueue) -> None:
    """Expect: 100-continue."""
    head, body = post(CHAT, "Expect: 100-continue").split(b"\r\n\r\n", 1)
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(head + b"\r\n\r\n")
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await client.send(body)
        queue.answer(await queue.job(), b"{}")
        assert (await client.answer()).status == 200


async def test_a_page_of_another_origin_gets_its_headers(queue: FakeQueue) -> None:
    """CORS is ASGI's."""
    origin = "https://app.example.com"
    async with fake_router(queue, cors_allow_origins=[origin]) as port, RawClient.to(port) as client:
        await client.send(post(CHAT, f"Origin: {origin}"))
        queue.answer(await queue.job(), b"{}")
        assert (await client.answer()).headers["access-control-allow-origin"] == origin


@BOTH_WAYS
async def test_an_answer_that_cannot_be_sent_is_an_error(queue: FakeQueue, way: tuple[str, ...]) -> None:
    """A worker's header that would begin another line: never let through, told, and logged."""
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(CHAT, *way))
        job = await queue.job()
        headers = {"retry-after": "1\r\nset-cookie: a=b"}
        queue.deliver(Frame(job.id, 1, "a", 0, HEAD | END, b"{}", 200, "application/json", headers))
        answer = await client.answer()
        assert answer.status == 500 and "set-cookie" not in answer.headers
        assert answer.headers["x-request-id"] == "mine"
