"""Background responses over HTTP, on a queue in memory: what is queued, shown, replayed and refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from queue_schemas import END, HEAD, Enqueued, Frame, Job, Lane, MarkerKind, OutputPage, PersistedJob, Pool, State
from router.responses.chat_only_engines import REMEMBERED_S, ChatOnlyEngines
from tests.support.responses import check_response, check_stream
from tests.support.sse import parse_events
from tests.support.waiting import eventually
from tests.unit.router.fakes import SSE, Answer, Client, FakeQueue, router

PATH = "/v1/responses"
ASK = {"model": "m", "input": "hi", "background": True, "metadata": {"a": "b"}}


def says(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + orjson.dumps({"object": "chat.completion.chunk", "choices": [choice]}) + b"\n\n"


STORY = (says("a"), says("b"), says("", "stop"), b"data: [DONE]\n\n")


def run_of(job: Job, *pieces: bytes, end: bool = True) -> tuple[Frame, ...]:
    """The frames of one attempt."""
    last = len(pieces) - 1
    return tuple(
        Frame(job.id, 1, "a1", at, (HEAD if not at else 0) | (END if end and at == last else 0), piece, 200, SSE)
        for at, piece in enumerate(pieces)
    )


def end_as(queue: FakeQueue, job: Job, state: State, *pieces: bytes, cause: str = "", **fields: Any) -> PersistedJob:
    """The job has ended, or stands, with this output kept of it."""
    frames = run_of(job, *pieces, end=state in (State.DONE, State.FAILED))
    attempt = "a1" if state in (State.DONE, State.FAILED, State.LEASED) else ""
    queue.outputs[job.id] = OutputPage(state, 1, attempt, (1, len(frames)), frames, complete=True, cause=cause)
    defaults: dict[str, Any] = {"output_epoch": 1 if frames else 0}
    queue.persisted[job.id] = replace(queue.persisted[job.id], state=state, cause=cause, **(defaults | fields))
    return queue.persisted[job.id]


async def created(client: Client, queue: FakeQueue, **fields: Any) -> tuple[Answer, Job]:
    answer = await client.post(ASK | fields, PATH).done()
    return answer, await queue.job()


async def test_a_background_response_is_queued_as_a_persisted_chat() -> None:
    """On the background lane, with a notice of its end; the object comes at once."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer, job = await created(Client(app), queue, temperature=0.5)
    assert answer.status == 200
    response = check_response(answer.json())
    assert (response.id, response.status, response.metadata) == (f"resp_{job.id}", "queued", {"a": "b"})
    assert (job.path, job.lane, job.stream, job.persisted, job.on_loss) == (
        "/v1/chat/completions", Lane.BACKGROUND, True, True, "continue",
    )  # fmt: skip
    assert orjson.loads(job.body)["messages"] == [{"role": "user", "content": "hi"}]
    assert (queue.persist_options[job.id].topic, queue.persist_options[job.id].background) == ("response", True)


async def test_without_background_the_body_passes_untouched() -> None:
    """The engine's own Responses API gets the client's own bytes."""
    queue = FakeQueue("m")
    body = b'{ "model":"m", "input":"hi", "previous_response_id": "resp_1", "background": false }'
    async with router(queue) as app:
        answer = Client(app).post(body, PATH)
        job = await queue.job()
        queue.answer(job, b'{"object": "response"}')
        await answer.done()
    assert (job.path, job.body, job.persisted, job.lane) == (PATH, body, False, Lane.INTERACTIVE)
    assert answer.body == b'{"object": "response"}'


@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_built_from_a_chat_where_engines_have_no_responses(stream: bool) -> None:
    """With ``responses = chat`` the engine is asked for a chat, and the client gets a response."""
    queue = FakeQueue("m")
    async with router(queue, responses="chat") as app:
        answer = Client(app).post({"model": "m", "input": "hi", "stream": stream}, PATH)
        job = await queue.job()
        queue.stream(job, *STORY)
        await answer.done()
    assert (job.path, job.persisted) == ("/v1/chat/completions", False)
    if stream:
        assert answer.headers["content-type"].startswith("text/event-stream")
        response = check_stream(parse_events(answer.body))
    else:
        assert answer.headers["content-type"] == "application/json"
        response = check_response(answer.json())
    assert (response.output_text, response.background) == ("ab", False)


NOT_FOUND = b'{"detail":"Not Found"}'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [404, 405, 501])
async def test_an_engine_without_responses_is_asked_for_a_chat(stream: bool, status: int) -> None:
    """[F3] By itself, plain and streamed; the next request for the model is a chat at once, and after a while the
    engine is asked again."""
    queue, ask = FakeQueue("m", "n"), {"model": "m", "input": "hi", "stream": stream}
    async with router(queue) as app:
        client = Client(app)
        answer = client.post(ask, PATH)
        first = await queue.job()
        queue.deliver(Frame(first.id, 1, "a", 0, HEAD, NOT_FOUND[:5], status, "application/json"))
        queue.deliver(Frame(first.id, 1, "a", 1, END, NOT_FOUND[5:]))
        chat = await queue.job()
        assert (first.path, chat.path, chat.stream) == (PATH, "/v1/chat/completions", True)
        assert chat.id != first.id and 0 < chat.ttl_ms <= first.ttl_ms
        queue.stream(chat, *STORY)
        await answer.done()
        response = check_stream(parse_events(answer.body)) if stream else check_response(answer.json())
        assert (answer.status, response.output_text) == (200, "ab")
        again = client.post(ask, PATH)
        known = await queue.job()
        assert known.path == "/v1/chat/completions"
        queue.stream(known, *STORY)
        assert (await again.done()).status == 200
        other = client.post(ask | {"model": "n"}, PATH)
        unknown = await queue.job()
        assert unknown.path == PATH
        queue.answer(unknown, b'{"object": "response"}')
        await other.done()
    assert len(app.services.requests) == 0


async def test_the_answer_of_an_engine_with_responses_passes_as_it_is() -> None:
    """[F3] In the pieces in which it comes; so does the error of an engine that knows the path."""
    queue, ask = FakeQueue("m"), {"model": "m", "input": "hi", "stream": True}
    async with router(queue) as app:
        client = Client(app)
        answer = client.post(ask, PATH)
        job = await queue.job()
        queue.stream(job, b"data: 1\n\n", end=False)
        await answer.until(lambda: b"data: 1" in answer.body)
        queue.stream(job, b"data: 2\n\n", first=1)
        await answer.done()
        refused = client.post(ask, PATH)
        queue.answer(await queue.job(), b'{"error": {"message": "no"}}', status=400)
        await refused.done()
        kept = client.post(ask | {"previous_response_id": "resp_1"}, PATH)
        queue.answer(await queue.job(), NOT_FOUND, status=404)
        await kept.done()
    assert answer.body.startswith(b"data: 1\n\ndata: 2\n\n")
    assert (refused.status, kept.status, kept.error["message"]) == (400, 404, "Not Found")


async def test_a_response_under_a_key_is_one_job() -> None:
    """[F3] It is a chat from the beginning, as its job cannot be sent in another form later; what no chat can say goes
    to the engine."""
    queue, key = FakeQueue("m"), {"idempotency-key": "one"}
    async with router(queue) as app:
        client = Client(app)
        answer = client.post({"model": "m", "input": "hi"}, PATH, key)
        job = await queue.job()
        queue.stream(job, *STORY)
        await answer.done()
        other = client.post({"model": "m", "input": "hi", "previous_response_id": "resp_1"}, PATH, key)
        engines = await queue.job()
        queue.answer(engines, b"{}")
        await other.done()
    assert (job.path, engines.path) == ("/v1/chat/completions", PATH)
    assert check_response(answer.json()).output_text == "ab"


async def test_the_deadline_of_a_response_holds_for_its_chat() -> None:
    """[F3] Sent in another form, a request has no more time than before; its client's leaving cancels the chat."""
    queue, ask = FakeQueue("m"), {"model": "m", "input": "hi"}
    async with router(queue, deadline_grace_ms=0) as app:
        client = Client(app)
        late = client.post(ask, PATH, {"x-inferq-deadline-ms": "300"})
        queue.answer(await queue.job(), NOT_FOUND, status=404)
        assert (await queue.job()).ttl_ms <= 300
        assert (await late.done()).status == 504
        client = Client(app)
        gone = client.post(ask, PATH)
        chat = await queue.job()
        client.gone.set()
        while (await queue.cancellation())[0] != chat.id:
            pass
        await gone.done()


async def test_a_model_is_asked_for_responses_again_after_a_while() -> None:
    """[F3] What is remembered of its engines expires."""
    now = 0.0
    models = ChatOnlyEngines(lambda: now)
    models.add(Pool("m"))
    assert Pool("m") in models and Pool("n") not in models
    now = REMEMBERED_S
    assert Pool("m") not in models


async def test_the_events_of_a_background_response_can_be_read_from_any_number() -> None:
    """From the beginning with the request itself, and from any number later, first persisted and then live."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        queue.attach_allowed.clear()
        answer = client.post(ASK | {"stream": True}, PATH)
        job = await queue.job()
        queue.outputs[job.id] = OutputPage(State.QUEUED, 1, "", (0, 0), (), complete=True)
        queue.attach_allowed.set()
        await answer.until(lambda: b"response.queued" in answer.body)
        queue.stream(job, *STORY)
        whole = parse_events((await answer.done()).body)
        assert check_stream(whole).output_text == "ab"
        end_as(queue, job, State.LEASED, *STORY[:1])
        for after in range(len(whole)):
            later = client.begin("GET", f"{PATH}/resp_{job.id}?stream=true&starting_after={after}")
            await eventually(lambda: job.id in app.services.requests.followers, "it is followed")
            queue.deliver(*run_of(job, *STORY)[1:])
            assert parse_events((await later.done()).body) == whole[after + 1 :]


async def test_events_of_a_replaced_answer_cannot_be_resumed() -> None:
    """A number alone cannot say which answer it is of: it is refused, unless no output precedes it."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        end_as(queue, job, State.DONE, *STORY, output_replaced=True)
        for after, status in ((3, 400), (7, 400), (2, 200), (0, 200)):
            answer = await client.request("GET", f"{PATH}/resp_{job.id}?stream=true&starting_after={after}")
            assert answer.status == status
        end_as(queue, job, State.QUEUED)
        answer = await client.request("GET", f"{PATH}/resp_{job.id}?stream=true&starting_after=9")
        assert (answer.status, answer.error["param"]) == (400, "starting_after")


@pytest.mark.parametrize(
    ("state", "pieces", "status", "words"),
    [
        (State.QUEUED, (), "queued", None),
        (State.LEASED, STORY[:1], "in_progress", None),
        (State.LOST, STORY[:1], "in_progress", None),
        (State.DONE, STORY, "completed", None),
        (State.DONE, STORY[:1], "failed", "broke off"),
        (State.DONE, (), "failed", "a part of the answer is not kept any more"),
        (State.CANCELLED, STORY[:1], "cancelled", "on demand"),
        (State.DEAD, STORY[:1], "failed", "on demand"),
        (State.EXPIRED, (), "failed", "on demand"),
    ],
)
async def test_the_response_shows_the_state_of_its_job(
    state: State, pieces: tuple[bytes, ...], status: str, words: str | None
) -> None:
    """The stream and the object agree; output before an end without an answer stays."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        kept = end_as(queue, job, state, *pieces, cause="on demand")
        response = check_response((await client.request("GET", f"{PATH}/resp_{job.id}")).json())
        if kept.over and status != "failed":
            streamed = await client.request("GET", f"{PATH}/resp_{job.id}?stream=true")
            assert check_stream(parse_events(streamed.body)) == response
    assert response.status == status
    assert (response.error is not None) == (words is not None)
    if words is not None and response.error is not None:
        assert words in response.error.message
    assert response.output_text == ("ab" if status == "completed" else "a" if kept.over and pieces else "")


async def test_a_job_that_is_not_a_response_is_not_found() -> None:
    """Nor is one of another tenant, or a malformed id."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        await client.post({"model": "m"}, "/v1/chat/completions", {"x-inferq-background": "true"}).done()
        job = await queue.job()
        for name in (f"resp_{job.id}", job.id, "resp_", "resp_1-" + "a" * 32, "%2e%2e"):
            for method, page in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
                answer = await client.request(method, f"{PATH}/{name}{page}")
                assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_the_input_of_a_response_is_listed_in_pages() -> None:
    """Newest first unless asked otherwise, behind any item."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        items = [{"role": "user", "content": str(number)} for number in range(5)]
        _, job = await created(client, queue, input=items)
        page = f"{PATH}/resp_{job.id}/input_items"
        first = (await client.request("GET", f"{page}?limit=2")).json()
        assert [item["content"][0]["text"] for item in first["data"]] == ["4", "3"]
        assert first["has_more"]
        rest = (await client.request("GET", f"{page}?after={first['last_id']}")).json()
        assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "1", "0"]
        assert not rest["has_more"]
        upward = (await client.request("GET", f"{page}?order=asc&limit=1")).json()
        assert upward["data"][0]["content"][0]["text"] == "0"
        assert (await client.request("GET", f"{page}?after=nobody")).error["param"] == "after"


async def test_a_key_leads_to_the_response_that_it_made() -> None:
    """Sent again, it is answered with that response as it is now."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        end_as(queue, job, State.DONE, *STORY)
        queue.holder = Enqueued(job.id, State.DONE)
        again = await client.post(ASK, PATH, {"idempotency-key": "one"}).done()
    response = check_response(again.json())
    assert (response.id, response.status, response.output_text) == (f"resp_{job.id}", "completed", "ab")


async def test_a_key_gives_one_response_also_without_background() -> None:
    """Built from a chat, and asked for twice: both are the response of the one job."""
    queue = FakeQueue("m")
    ask, key = {"model": "m", "input": "hi"}, {"idempotency-key": "one"}
    async with router(queue, responses="chat") as app:
        client = Client(app)
        first = client.post(ask, PATH, key)
        job = await queue.job()
        queue.stream(job, *STORY)
        await first.done()
        queue.holder = Enqueued(job.id, State.DONE)
        queue.outputs[job.id] = OutputPage(State.DONE, 1, "a1", (1, 4), run_of(job, *STORY), complete=True)
        again = await client.post(ask, PATH, key).done()
    assert first.json()["id"] == again.json()["id"] == f"resp_{job.id}"
    assert check_response(again.json()).output_text == "ab"


async def test_a_key_tells_responses_apart_that_make_the_same_chat() -> None:
    """[D1] Metadata, background and all else that a chat does not contain is part of the request under a key."""
    queue = FakeQueue("m")
    digests = []
    async with router(queue, responses="chat") as app:
        client = Client(app)
        for fields in ({}, {"metadata": {"a": "c"}}, {"background": False}, {}):
            client.post(ASK | fields, PATH, {"idempotency-key": "one"})
            job = await queue.job()
            digests.append((queue.persist_options[job.id].metadata.request_digest, job.body))
    (first, metadata, waited, again), bodies = [digest for digest, _ in digests], {body for _, body in digests}
    assert len(bodies) == 1
    assert first == again
    assert len({first, metadata, waited}) == 3


async def test_a_response_is_cancelled_and_deleted_with_its_job() -> None:
    """What is deleted is not found afterwards."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        cancelled = client.begin("POST", f"{PATH}/resp_{job.id}/cancel")
        assert (await queue.cancellation())[0] == job.id
        assert (await cancelled.done()).status == 200
        gone = await client.request("DELETE", f"{PATH}/resp_{job.id}")
        assert gone.json() == {"id": f"resp_{job.id}", "object": "response", "deleted": True}
        assert (await client.request("DELETE", f"{PATH}/resp_{job.id}")).status == 404


async def test_a_response_cancelled_while_it_is_followed_ends_with_an_event() -> None:
    """The stream is whole: its last event is the response as it is then."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        end_as(queue, job, State.LEASED, *STORY[:1])
        answer = client.begin("GET", f"{PATH}/resp_{job.id}?stream=true")
        await answer.until(lambda: b'"delta":"a"' in answer.body)
        queue.mark(job, MarkerKind.CANCELLED, reason="it was cancelled on demand")
        response = check_stream(parse_events((await answer.done()).body))
    assert response.status == "cancelled"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": "yes"}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": None}, "input"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
async def test_a_request_that_no_chat_can_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    """With the error object that names the parameter; nothing is queued."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = await Client(app).post(ASK | fields, PATH).done()
    assert (answer.status, answer.error["param"]) == (400, param)
    assert queue.enqueued.empty()


async def test_starting_after_needs_a_stream_and_a_number() -> None:
    """A number of an event without a stream, and one below 0."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        _, job = await created(client, queue)
        for query in ("starting_after=3", "stream=true&starting_after=-1", "stream=maybe"):
            assert (await client.request("GET", f"{PATH}/resp_{job.id}?{query}")).status == 400
