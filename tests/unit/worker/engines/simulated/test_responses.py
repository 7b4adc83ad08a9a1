"""What a simulated engine says beyond plain text: calls of functions, thoughts, and the Responses API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from tests.support.responses import check_response, check_stream
from tests.support.sse import parse_events
from worker.engines.simulated import Simulation, SimulationSettings
from worker.engines.simulated.api.wire import Reply
from worker.engines.simulated.app import SimulationApp

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "minLength": 20}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
ASK = [{"role": "user", "content": "Ask weather."}]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A connection to an engine that takes no time."""
    app = SimulationApp(Simulation(SimulationSettings(ttft_ms=0, prefill_us_per_token=0, tokens_per_s=0)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://engine") as client:  # type: ignore[arg-type]
        yield client


async def _chat(client: httpx.AsyncClient, **request: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json={"messages": ASK, "tools": [WEATHER], **request})
    assert answer.status_code == 200, answer.text
    if not request.get("stream"):
        return dict(answer.json()["choices"][0])
    said: dict[str, Any] = {"arguments": "", "content": "", "reasoning": ""}
    for chunk in parse_events(answer.content):
        for choice in chunk["choices"]:
            openai.types.chat.ChatCompletionChunk.model_validate(chunk)
            delta = choice["delta"]
            for call in delta.get("tool_calls", ()):
                said["arguments"] += call["function"]["arguments"]
                said["name"] = call["function"].get("name", said.get("name"))
                said["call_id"] = call.get("id", said.get("call_id"))
            said["content"] += delta.get("content") or ""
            said["reasoning"] += delta.get("reasoning") or ""
            said["finish"] = choice["finish_reason"]
    return said


async def test_a_function_is_called_when_it_is_named_or_a_call_is_required(client: httpx.AsyncClient) -> None:
    """Plain and streamed: the name, an id, arguments that are JSON, and the finish reason of a call."""
    plain = await _chat(client)
    call = plain["message"]["tool_calls"][0]
    assert (call["function"]["name"], plain["finish_reason"]) == ("weather", "tool_calls")
    assert json.loads(call["function"]["arguments"])
    streamed = await _chat(client, stream=True)
    assert streamed["arguments"] == call["function"]["arguments"]
    assert (streamed["name"], streamed["finish"], bool(streamed["call_id"])) == ("weather", "tool_calls", True)
    hello = [{"role": "user", "content": "Hello"}]
    assert (await _chat(client, messages=hello))["message"]["content"]
    assert (await _chat(client, messages=hello, tool_choice="required"))["message"]["tool_calls"]
    assert (await _chat(client, tool_choice="none"))["message"]["content"]
    assert (await _chat(client, max_tokens=3))["finish_reason"] == "length"


async def test_thoughts_come_first_where_effort_is_asked_for(client: httpx.AsyncClient) -> None:
    """They stand apart from the text, and together they are the text of a request without them."""
    bare = (await _chat(client, tool_choice="none"))["message"]["content"]
    message = (await _chat(client, tool_choice="none", reasoning_effort="low"))["message"]
    assert message["reasoning"] + message["content"] == bare
    streamed = await _chat(client, tool_choice="none", reasoning_effort="low", stream=True)
    assert (streamed["reasoning"], streamed["content"]) == (message["reasoning"], message["content"])


@pytest.mark.parametrize("limit", [None, 5])
async def test_a_response_plain_and_streamed(client: httpx.AsyncClient, limit: int | None) -> None:
    """Both are what the SDK's types say, and say the same; a limit makes it incomplete."""
    request = {"model": "sim", "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": limit}
    plain = check_response((await client.post("/v1/responses", json=request)).json())
    assert plain.status == ("completed" if limit is None else "incomplete")
    streamed = check_stream(
        parse_events((await client.post("/v1/responses", json={**request, "stream": True})).content)
    )
    assert streamed.output_text == plain.output_text != ""


def test_what_it_does_not_do_is_refused() -> None:
    """Nothing is kept between requests, so nothing may refer to an earlier one."""
    engine = Simulation(SimulationSettings())
    for request in ({"input": "x", "previous_response_id": "resp_1"}, {"input": 3}, {"input": [{"role": "user"}]}):
        reply = engine.open("POST", "/v1/responses", orjson.dumps(request))
        assert isinstance(reply, Reply)
        assert reply.status == 400
