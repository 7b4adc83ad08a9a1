"""Which streams may be continued behind what was delivered, and how the Router does it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from openai_api.sse import MAX_EVENT_BYTES
from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    BrokerFull,
    BrokerUnavailable,
    Frame,
    InferqError,
    Job,
    MarkerKind,
    State,
)
from router.inference.request_fields import RequestFields, read_fields
from tests.support.waiting import eventually
from tests.unit.router.fakes import SSE, Client, FakeQueue, router

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PROMPT = {"model": "m", "prompt": "Once", "stream": True}
DONE = b"data: [DONE]\n\n"


def fields_of(request: Any, path: str) -> RequestFields:
    return read_fields(orjson.dumps(request), "application/json", path)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
        {"stop": ["\n"], "stop_token_ids": [2], "ignore_eos": True, "min_tokens": 2, "logit_bias": {"1": 2}},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "u", "metadata": {"a": "b"}, "priority": 3},
        {"seed": 7, "temperature": 0},
        {"skip_special_tokens": True, "include_stop_str_in_output": False, "response_format": {"type": "text"}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "tools": None, "logprobs": None},
        {"sim": {"fail": "crash"}},
    ],
)
@pytest.mark.parametrize(("base", "path"), [(ASK, CHAT), (PROMPT, COMPLETIONS)])
def test_parameters_that_allow_a_continuation(base: dict[str, Any], path: str, more: dict[str, Any]) -> None:
    """Each means the same for the rest of an answer as for the whole of it."""
    request = {**base, **({name: value for name, value in more.items() if name != "tools"} if path != CHAT else more)}
    assert fields_of(request, path).continuable


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"n": 2},
        {"n": True},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 1},
        {"seed": 7},
        {"seed": 7, "temperature": 0.5},
        {"guided_json": "{}"},
        {"structured_outputs": {}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"reasoning_effort": "low"},
        {"skip_special_tokens": False},
        {"include_stop_str_in_output": True},
        {"bad_words": ["of several tokens"]},
        {"return_token_ids": True},
        {"something_new": 0},
        {"stream": False},
    ],
)
@pytest.mark.parametrize(("base", "path"), [(ASK, CHAT), (PROMPT, COMPLETIONS)])
def test_parameters_that_forbid_a_continuation(base: dict[str, Any], path: str, more: dict[str, Any]) -> None:
    """Their state is not in the text, or nothing is known of them."""
    assert not fields_of({**base, **more}, path).continuable


@pytest.mark.parametrize(
    ("request_fields", "choices"),
    [
        (ASK, 1),
        ({**ASK, "n": 3}, 3),
        (PROMPT, 1),
        ({**PROMPT, "prompt": [1, 2, 3]}, 1),
        ({**PROMPT, "prompt": ["a", "b"], "n": 2}, 4),
        ({**PROMPT, "prompt": [[1, 2], [3]]}, 2),
        ({**PROMPT, "prompt": [], "n": None}, 1),
        ({**PROMPT, "prompt": None, "prompt_embeds": ["x", "y"]}, 2),
        ({**PROMPT, "prompt_embeds": ["x", "y"]}, 3),
    ],
)
def test_the_choices_of_a_stream_are_counted(request_fields: Any, choices: int) -> None:
    """So many have to end before the stream is complete."""
    path = CHAT if "messages" in request_fields else COMPLETIONS
    assert fields_of(request_fields, path).choices == choices


@pytest.mark.parametrize(
    ("request_fields", "path"),
    [
        ({**ASK, "messages": [{"role": "assistant", "content": "Once"}]}, CHAT),
        ({**ASK, "messages": []}, CHAT),
        ({**ASK, "messages": "hi"}, CHAT),
        ({**PROMPT, "prompt": [1, 2]}, COMPLETIONS),
        ({**PROMPT, "prompt": ["a", "b"]}, COMPLETIONS),
        ({**PROMPT, "echo": True}, COMPLETIONS),
        ({**PROMPT, "suffix": "end"}, COMPLETIONS),
        ({**PROMPT, "best_of": 2}, COMPLETIONS),
        (ASK, "/v1/responses"),
        (PROMPT, "/v1/chat/completions/x"),
    ],
)
def test_requests_without_one_text_to_continue(request_fields: dict[str, Any], path: str) -> None:
    """A prefix needs one text behind which nothing else stands."""
    assert not fields_of(request_fields, path).continuable


@pytest.mark.parametrize(
    ("options", "wanted"),
    [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True), ("x", False)],
)
def test_whether_the_usage_is_requested(options: Any, wanted: bool) -> None:
    """A stream that was asked for it is not complete without it."""
    assert fields_of({**ASK, "stream_options": options}, CHAT).usage is wanted


@pytest.mark.parametrize(
    ("header", "setting", "request_fields", "policy"),
    [
        (None, "continue", ASK, "continue"),
        ("restart", "continue", ASK, "restart"),
        ("fail", "continue", ASK, "fail"),
        ("continue", "restart", ASK, "continue"),
        (None, "fail", ASK, "fail"),
        (None, "continue", ASK | {"n": 2}, "restart"),
        ("continue", "continue", ASK | {"seed": 1}, "restart"),
        (None, "continue", ASK | {"stream": False}, "restart"),
    ],
)
async def test_the_policy_of_a_request(
    header: str | None, setting: str, request_fields: dict[str, Any], policy: str
) -> None:
    """The header, else the setting; a stream that cannot continue is run again and compared."""
    queue = FakeQueue("m")
    async with router(queue, on_loss=setting) as app:
        answer = Client(app).post(request_fields, headers={"x-inferq-on-loss": header} if header else {})
        job = await queue.job()
        queue.answer(job, b"{}", status=400)
        await answer.done()
    assert job.on_loss == policy


async def test_an_unknown_policy_is_refused() -> None:
    """The error names the policies."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = await Client(app).post(ASK, headers={"x-inferq-on-loss": "ignore"}).done()
    assert (answer.status, answer.error["param"]) == (400, "x-inferq-on-loss")
    assert "continue, restart or fail" in answer.error["message"]
    assert queue.enqueued.empty()


def chunk(text: str, ident: str = "one") -> bytes:
    body = {"id": ident, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


def go_on(queue: FakeQueue, job: Job, epoch: int, *pieces: bytes) -> None:
    """A worker goes on behind the prefix."""
    last = len(pieces) - 1
    for seq, data in enumerate(pieces):
        flags = (HEAD | CONTINUED if seq == 0 else 0) | (END if seq == last else 0)
        head = (200, SSE) if seq == 0 else (0, "")
        queue.deliver(Frame(job.id, epoch, f"c{epoch}", seq, flags, data, *head))


async def test_a_lost_stream_continues_over_one_connection() -> None:
    """The queue gets the delivered text as prefix, and the client sees one stream; twice."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(ASK)
        job = await queue.job()
        queue.stream(job, chunk("Once "), end=False)
        await answer.until(lambda: b"Once" in answer.body)
        queue.mark(job, MarkerKind.LOST, 2)
        resumed, epoch = await queue.resumed.get()
        assert (resumed.id, resumed.prefix, resumed.body, epoch) == (job.id, "Once ", job.body, 2)
        queue.deliver(Frame(job.id, 2, "c2", 0, HEAD | CONTINUED, chunk("upon ", "two"), 200, SSE))
        await answer.until(lambda: b"upon" in answer.body)
        queue.mark(job, MarkerKind.LOST, 3)
        assert (await queue.resumed.get())[0].prefix == "Once upon "
        go_on(queue, job, 3, chunk("a time", "three"), DONE)
        await answer.done()
        metrics = (await Client(app).request("GET", "/metrics")).body
    assert answer.body == chunk("Once ") + chunk("upon ") + chunk("a time") + DONE
    assert b'inferq_streams_interrupted_total{outcome="continued"} 1.0' in metrics
    assert queue.cancelled.empty()


async def test_a_stream_that_delivered_nothing_is_resumed_without_a_prefix() -> None:
    """Its job stays the same, and the attempt begins anew."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(ASK)
        job = await queue.job()
        queue.mark(job, MarkerKind.LOST, 2)
        assert await queue.resumed.get() == (job, 2)
        queue.stream(job, chunk("Hi"), DONE, epoch=2)
        await answer.done()
    assert answer.body == chunk("Hi") + DONE


@pytest.mark.parametrize("state", [None, State.CANCELLED])
async def test_a_job_that_the_queue_lost_runs_again_with_its_prefix(state: State | None) -> None:
    """Redis forgot it: it runs under another id, behind what was delivered."""
    queue = FakeQueue("m")
    queue.resume_state = state
    async with router(queue, sweep_interval_ms=10) as app:
        answer = Client(app).post(ASK)
        job = await queue.job()
        queue.stream(job, chunk("Once "), end=False)
        await answer.until(lambda: b"Once" in answer.body)
        queue.mark(job, MarkerKind.LOST, 2)
        again = await queue.job()
        if again.id == job.id:
            again = await queue.job()
        assert again.id != job.id
        assert again.prefix == "Once "
        go_on(queue, again, 1, chunk("upon"), DONE)
        await answer.done()
    assert answer.body == chunk("Once ") + chunk("upon") + DONE


@pytest.mark.parametrize("refusal", [BrokerUnavailable("Redis is away"), BrokerFull("Redis is full")])
async def test_a_resume_that_failed_is_repeated_at_the_next_marker(refusal: InferqError) -> None:
    """The client waits meanwhile."""
    queue = FakeQueue("m")
    queue.resume_refusal = refusal
    async with router(queue) as app:
        answer = Client(app).post(ASK)
        job = await queue.job()
        queue.mark(job, MarkerKind.LOST, 2)
        await queue.resumed.get()
        queue.resume_refusal = None
        queue.mark(job, MarkerKind.LOST, 2)
        await queue.resumed.get()
        queue.stream(job, chunk("Hi"), DONE, epoch=2)
        await answer.done()
    assert answer.body == chunk("Hi") + DONE


async def test_a_client_that_leaves_a_lost_stream_cancels_it() -> None:
    """No request waits for what would come."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        answer = client.post(ASK)
        job = await queue.job()
        queue.mark(job, MarkerKind.LOST, 2)
        await queue.resumed.get()
        client.gone.set()
        assert (await queue.cancellation())[0] == job.id
        await answer.done()
        await eventually(lambda: len(app.services.requests) == 0, "the request is over")


async def test_an_error_behind_half_an_event_is_an_event_of_its_own() -> None:
    """Half an event that is too long to be held back passes as it is; when its worker is lost, the error that ends the
    stream does not become part of it."""
    queue = FakeQueue("m")
    half = b"data: " + b"x" * (MAX_EVENT_BYTES + 1)
    async with router(queue, max_client_buffer_bytes=8 << 20) as app:
        answer = Client(app).post(ASK)
        job = await queue.job()
        queue.stream(job, half, end=False)
        await answer.until(lambda: answer.body == half)
        queue.mark(job, MarkerKind.REQUEUED, 2)
        queue.stream(job, chunk("Once "), DONE, epoch=2)
        await answer.done()
    assert orjson.loads(answer.body.removeprefix(half + b"\n\ndata: "))["error"]["code"] == "stream_broken"


async def test_a_stream_with_the_policy_fail_ends_with_an_error_event() -> None:
    """Its job is cancelled."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(ASK, headers={"x-inferq-on-loss": "fail"})
        job = await queue.job()
        queue.stream(job, chunk("Once "), end=False)
        await answer.until(lambda: b"Once" in answer.body)
        queue.mark(job, MarkerKind.REQUEUED, 2)
        await answer.done()
        assert (await queue.cancellation())[0] == job.id
        metrics = (await Client(app).request("GET", "/metrics")).body
    assert b'"code": "stream_broken"' in answer.body
    assert b'inferq_streams_interrupted_total{outcome="broken"} 1.0' in metrics
