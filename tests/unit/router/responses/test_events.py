"""A response and its events, built from the frames of a chat; each validated by the SDK's own types."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_api.chat_chunks import ChatFailure
from openai_api.response_jobs import status_of_output
from queue_schemas import CONTINUED, END, HEAD, Frame, JobId, State
from router.responses.events import ResponseEvents
from router.responses.schemas import ResponseRequest
from tests.support.responses import check_event, check_stream

JOB = JobId("0-" + "a" * 32)
REQUEST = {
    "model": "m",
    "input": "hi",
    "background": True,
    "metadata": {"k": "v"},
    "instructions": "be brief",
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "text": {"verbosity": "low"},
    "reasoning": {"effort": "low"},
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
DONE = b"data: [DONE]\n\n"
LOGPROB = {"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": [{"token": "b", "logprob": -2, "bytes": [98]}]}


def _sent(chunk: Any) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
    return _sent({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def _usage(**more: Any) -> bytes:
    return _sent({"id": "c", "choices": [], "usage": USAGE | more})


def _call(index: int, arguments: str, **more: Any) -> bytes:
    call = {"index": index, "function": {"arguments": arguments, **more}}
    return _chunk({"tool_calls": [call | ({"id": f"id{index}"} if more else {})]})


TEXT = [_chunk({"role": "assistant", "content": ""}), _chunk({"content": "Hel"}), _chunk({"content": "lo"})]
STOP = [_chunk({}, "stop"), _usage(), DONE]


def _frames(pieces: list[bytes], status: int = 200, kind: str = "text/event-stream") -> list[Frame]:
    last = len(pieces) - 1
    return [
        Frame(JOB, 1, "a", at, (HEAD if not at else 0) | (END if at == last else 0), piece, status, kind)
        for at, piece in enumerate(pieces)
    ]


def _events(frames: list[Frame], request: dict[str, Any] = REQUEST, *, background: bool = True) -> list[dict[str, Any]]:
    made = ResponseEvents(ResponseRequest(JOB, 5, request, background))
    return [*made.begin(), *(event for frame in frames for event in made.feed(frame))]


def _kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_is_one_message() -> None:
    """All events in their order, and the response at the end with usage and the fields of the request."""
    events = _events(_frames([*TEXT, *STOP]))
    assert _kinds(events) == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    response = check_stream(events)
    assert (response.output_text, response.status, response.id) == ("Hello", "completed", f"resp_{JOB}")
    assert (response.metadata, response.instructions, response.created_at) == ({"k": "v"}, "be brief", 5)
    assert response.usage is not None
    assert (response.usage.total_tokens, response.usage.input_tokens_details.cached_tokens) == (7, 2)


def test_reasoning_text_refusals_and_calls_are_separate_items() -> None:
    """Each opens with its first content; calls may be interleaved; log probabilities stay with their text."""
    pieces = [
        _chunk({"reasoning_content": "hm"}),
        _chunk({"reasoning": "m"}),
        _chunk({"content": "a"}, logprobs={"content": [LOGPROB]}),
        _chunk({"refusal": "no"}),
        _call(0, "", name="f"),
        _call(0, '{"x"'),
        _call(1, "{}", name="f"),
        _call(0, ":1}"),
        _chunk({}, "tool_calls"),
        _usage(completion_tokens_details={"reasoning_tokens": 2}),
        DONE,
    ]
    response = check_stream(_events(_frames(pieces)))
    thought, message, first, second = [item.model_dump() for item in response.output]
    assert thought["content"][0]["text"] == "hmm"
    assert [part["type"] for part in message["content"]] == ["output_text", "refusal"]
    assert message["content"][0]["logprobs"][0]["bytes"] == [97]
    assert (first["arguments"], first["call_id"], second["arguments"]) == ('{"x":1}', "id0", "{}")
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 2


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
        ("abort", "failed", None),
    ],
)
def test_the_finish_reason_decides_the_status(finish: str, status: str, reason: str | None) -> None:
    """A limit or a filter makes it incomplete, its last item too; an abort is a failure."""
    frames = _frames([*TEXT, _chunk({}, finish), DONE])
    response = check_stream(_events(frames))
    assert response.status == status
    assert (response.incomplete_details and response.incomplete_details.reason) == reason
    assert response.output[0].status == ("incomplete" if status == "incomplete" else "completed")  # type: ignore[union-attr]
    assert status_of_output(State.DONE, frames) == status


@pytest.mark.parametrize(
    ("frames", "code", "message"),
    [
        (_frames([b'{"error": {"message": "too long", "param": "input"}}'], 400), "invalid_prompt", "too long"),
        (_frames([b'{"error": {"message": "slow down"}}'], 429), "rate_limit_exceeded", "slow down"),
        (_frames([b"<html>"], 500), "server_error", "the engine answered with status 500"),
        (_frames([*TEXT, _sent({"error": {"message": "gone", "code": 502}}), DONE]), "server_error", "gone"),
        (_frames([*TEXT, b"data: {\n\n"]), "server_error", "the engine's answer is not a chat completion"),
        (_frames([*TEXT, b""]), "server_error", "the engine's answer broke off before its end"),
    ],
)
def test_a_failed_chat_is_a_failed_response(frames: list[Frame], code: str, message: str) -> None:
    """With a code that the API defines, and the output before the failure."""
    response = check_stream(_events(frames))
    assert response.status == status_of_output(State.FAILED, frames) == "failed"
    assert response.error is not None
    assert response.error.code == code
    assert response.error.message.startswith(message)
    assert all(item.status == "incomplete" for item in response.output)  # type: ignore[union-attr]


def test_a_whole_answer_becomes_events_too() -> None:
    """An engine that does not stream answers at once, including function calls."""
    message = {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": "{}"}}],
    }
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
    response = check_stream(_events(_frames([orjson.dumps(body)], kind="application/json")))
    assert (response.output_text, response.output[1].type) == ("Hi", "function_call")


@pytest.mark.parametrize(("how", "status"), [("fail", "failed"), ("cancel", "cancelled")])
def test_an_end_without_an_answer_is_an_event_with_its_reason(how: str, status: str) -> None:
    """A job that died or was cancelled midway ends the stream with an event of its own."""
    made = ResponseEvents(ResponseRequest(JOB, 5, REQUEST))
    events = [*made.begin(), *(event for frame in _frames([*TEXT, DONE])[:-1] for event in made.feed(frame))]
    events += made.fail(ChatFailure("it died")) if how == "fail" else made.cancel("it was cancelled")
    response = check_stream(events)
    assert response.status == status
    assert response.error is not None
    assert response.error.message.startswith("it ")
    assert made.over
    assert made.cancel("again") == []
    assert made.feed(_frames([DONE])[0]) == []


def test_a_foreground_response_is_in_progress_from_the_beginning() -> None:
    """Without background there is no queued state."""
    events = _events(_frames([*TEXT, *STOP]), {"model": "m", "input": "hi"}, background=False)
    assert _kinds(events)[:3] == ["created", "in_progress", "output_item.added"]
    assert check_stream(events).background is False


def test_a_continued_attempt_leaves_no_trace() -> None:
    """Half an event of the lost attempt, and the role with which the next one begins, make no event."""
    whole = _events(_frames([*TEXT, *STOP]))
    head = HEAD | CONTINUED
    frames = [
        Frame(JOB, 1, "a", 0, HEAD, b"".join(TEXT[:2]) + b"data: {", 200, "text/event-stream"),
        Frame(JOB, 2, "b", 0, head, TEXT[0] + TEXT[2], 200, "text/event-stream"),
        Frame(JOB, 2, "b", 1, END, b"".join(STOP)),
    ]
    assert _events(frames) == whole
    assert status_of_output(State.DONE, frames) == "completed"


@given(st.lists(st.integers(1, 3000), max_size=12))
def test_however_the_stream_is_cut_the_events_are_the_same(cuts: list[int]) -> None:
    """The numbers do not depend on how the bytes arrived."""
    stream = b"".join([*TEXT, _call(0, "{}", name="f"), *STOP])
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    pieces = [stream[start:end] for start, end in pairwise(places)]
    assert _events(_frames(pieces)) == _events(_frames([stream]))


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(
                            [
                                "choices",
                                "delta",
                                "index",
                                "content",
                                "tool_calls",
                                "function",
                                "usage",
                                "error",
                                "logprobs",
                            ]
                        ),
                        inner,
                        max_size=4,
                    )
                ),
                max_leaves=12,
            ).map(_sent),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_output_of_an_engine_makes_valid_events(pieces: list[bytes]) -> None:
    """Garbage makes a failed response, never an event that a client cannot read."""
    events = _events(_frames(pieces))
    for event in events:
        check_event(event)
    assert events[-1]["response"]["status"] in ("completed", "incomplete", "failed")


@pytest.mark.parametrize("finishes", [("stop", "length"), ("length", "stop"), ("error", "stop")])
def test_of_several_finish_reasons_the_first_counts(finishes: tuple[str, str]) -> None:
    """The response and its webhook agree about an engine that sends two."""
    frames = _frames([*TEXT, *(_chunk({}, finish) for finish in finishes), _usage(), DONE])
    made = ResponseEvents(ResponseRequest(JOB, 1, REQUEST))
    made.begin()
    for frame in frames:
        made.feed(frame)
    assert made.status == status_of_output(State.DONE, frames)
