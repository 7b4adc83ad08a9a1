"""A Responses request converted into a chat completion: what becomes of each field, and what is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_api.paths import CHAT_PATH
from openai_api.sse import encode_json
from queue_schemas import BadRequest, JobId
from router.inference.request_fields import read_fields
from router.responses.chat_request import as_chat
from router.responses.events import ResponseEvents
from router.responses.saved_request import save_request
from router.responses.schemas import ResponseRequest, input_item_objects

FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
SCHEMA = {"type": "object"}


def _chat(**request: Any) -> dict[str, Any]:
    return dict(orjson.loads(as_chat({"model": "m", "input": "hi", **request}).body))


def _messages(given: Any, **request: Any) -> list[dict[str, Any]]:
    return list(_chat(input=given, **request)["messages"])


def test_text_becomes_a_streamed_chat_that_can_be_continued() -> None:
    """The smallest request: one message of the user, usage at the end, and nothing that prevents a continuation."""
    chat = as_chat({"model": "m", "input": "hi", "background": True, "temperature": 0.7, "store": True, "user": "u"})
    assert orjson.loads(chat.body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "user": "u",
    }
    assert not chat.stream
    fields = read_fields(chat.body, "application/json", CHAT_PATH)
    assert (fields.stream, fields.continuable, fields.usage) == (True, True, True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_output_tokens": 9}, {"max_completion_tokens": 9}),
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
        ({"text": {"format": {"type": "text"}}}, {}),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"include": ["reasoning.encrypted_content"], "service_tier": "flex", "max_tool_calls": 3}, {}),
        ({"metadata": {"a": "b"}, "truncation": "disabled", "stream_options": {"include_obfuscation": False}}, {}),
        ({"top_k": 4, "min_p": 0.1, "priority": -1, "seed": 7}, {"top_k": 4, "min_p": 0.1, "priority": -1, "seed": 7}),
        ({"tool_choice": "none", "parallel_tool_calls": True, "tools": []}, {}),
        (
            {"tools": [FUNCTION], "parallel_tool_calls": False},
            {
                "tools": [
                    {"type": "function", "function": {k: v for k, v in FUNCTION.items() if k != "type"}},
                ],
                "tool_choice": "auto",
                "parallel_tool_calls": False,
            },
        ),
    ],
)
def test_each_field_gets_its_chat_completion_name(asked: dict[str, Any], said: dict[str, Any]) -> None:
    """What an engine reads under another name gets that name, what it does not know is removed, the rest is passed
    on."""
    assert {name: value for name, value in _chat(**asked).items() if name not in _chat()} == said


def test_a_named_function_is_chosen() -> None:
    """The choice of one function has its name one level deeper in a chat."""
    choice = {"type": "function", "name": "f"}
    assert _chat(tools=[FUNCTION], tool_choice=choice)["tool_choice"] == {
        "type": "function",
        "function": {"name": "f"},
    }


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (
            [{"role": "developer", "content": "b"}, {"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
            [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "q"}],
        ),
        (
            [
                {"role": "user", "content": "q"},
                SAID,
                {"type": "reasoning", "id": "rs", "summary": []},
                CALL,
                {**CALL, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            ],
            [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [
                        {"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}}
                        for id_ in ("c1", "c2")
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "tool", "tool_call_id": "c2", "content": "2"},
            ],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "what?"},
                        {"type": "input_image", "image_url": "data:x", "detail": "low"},
                        {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
                    ],
                }
            ],
            [
                {"role": "system", "content": "a"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "what?"},
                        {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}},
                        {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
                    ],
                },
            ],
        ),
        (
            [
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "user", "content": "?"},
            ],
            [
                {"role": "system", "content": "a"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "?"},
            ],
        ),
    ],
)
def test_items_become_messages(given: Any, messages: list[dict[str, Any]]) -> None:
    """Instructions and leading system messages are one; calls join the message before them; reasoning is left out."""
    assert _messages(given, instructions="a") == messages


def test_a_system_message_in_the_middle_stays_there() -> None:
    """Only the leading ones are joined: moving another one would change the conversation."""
    given = [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]
    assert [message["role"] for message in _messages(given)] == ["user", "system"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "system", "content": "s"}]}, "input"),
        ({"input": [{"role": "critic", "content": "s"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call", "id": "i"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"instructions": ["x"]}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"store": False, "background": True}, "store"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": "x"}, "text"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"service_tier": "best"}, "service_tier"),
        ({"include": [3]}, "include[0]"),
        ({"include": ["everything"]}, "include[0]"),
        ({"text": {"colour": "red"}}, "text.colour"),
        ({"text": {"format": {"type": "text", "shape": 1}}}, "text.format.shape"),
        ({"reasoning": {"effort": "low", "depth": 3}}, "reasoning.depth"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
    ],
)
def test_what_a_chat_cannot_say_is_refused_by_name(asked: dict[str, Any], param: str) -> None:
    """Nothing is left out silently: the error names the parameter, and its sentence begins with it."""
    with pytest.raises(BadRequest) as caught:
        as_chat({"model": "m", "input": "hi", **asked})
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


@pytest.mark.parametrize("place", ["tools", "input", "text", "top_k"])
def test_a_request_nested_too_deeply_is_refused(place: str) -> None:
    """Any accepted request can be encoded again, with all that is put around it."""
    for depth in (100, 240, 254, 300, 900):
        deep = orjson.loads(b'{"a":' * depth + b"1" + b"}" * depth)
        fields: dict[str, Any] = {
            "tools": [{**FUNCTION, "parameters": deep}],
            "input": [{"role": "user", "content": "x", "more": deep}],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": deep}},
            "top_k": deep,
        }
        request = {"model": "m", "input": "hi", place: fields[place]}
        try:
            as_chat(request)
        except BadRequest as error:
            assert depth > 100
            assert "nested too deeply" in error.message
        else:
            made = ResponseEvents(ResponseRequest(JobId("0-" + "a" * 32), 1, request))
            for event in [*made.begin(), *made.cancel("enough")]:
                encode_json(event, event["type"])
            save_request(1, request)


_NAMES = (
    "input", "instructions", "metadata", "tools", "tool_choice", "text", "format", "type", "role", "content", "name",
    "schema", "reasoning", "effort", "include", "top_logprobs", "temperature", "stream", "store", "arguments",
    "call_id", "output", "image_url", "input_audio", "top_k",
)  # fmt: skip
_WORDS = ("message", "function", "function_call", "function_call_output", "input_text", "json_schema", "user", "auto")
_ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.sampled_from(_WORDS) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(_NAMES), _ODD, max_size=8))
def test_any_request_is_converted_or_refused(odd: dict[str, Any]) -> None:
    """Never an error of ours; an accepted request makes a chat, a response and a list of its input."""
    request = {"model": "m", "input": "hi", "background": True} | odd
    try:
        chat = as_chat(orjson.loads(orjson.dumps(request)))
    except BadRequest as error:
        assert error.param or "nested" in error.message
        return
    assert read_fields(chat.body, "application/json", CHAT_PATH).stream
    asked = ResponseRequest(JobId("0-" + "a" * 32), 1, request)
    for event in ResponseEvents(asked).begin():
        encode_json(event, event["type"])
    assert all(item["id"] for item in input_item_objects(asked))


def test_the_input_is_listed_with_ids() -> None:
    """Text is a message; each item has an id that is always the same."""
    job = JobId("0-" + "a" * 32)
    assert input_item_objects(ResponseRequest(job, 1, {"input": "hi"})) == [
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
            "id": f"msg_{job}_in0",
            "status": "completed",
        }
    ]
    given = [SAID, {"role": "user", "content": "?"}, {**CALL, "id": "mine"}]
    listed = input_item_objects(ResponseRequest(job, 1, {"input": given}))
    assert [item["id"] for item in listed] == [f"msg_{job}_in0", f"msg_{job}_in1", "mine"]
