"""Background responses of a real model, by the unmodified SDK: its chat, told as a response."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from inferq.chat.client import ChatClient
from inferq.vllm_setup import DEFAULT_MODEL
from tests.support.responses import check_stream
from tests.support.waiting import eventually

from .conftest import RealFleet

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(2400)]

CAPITAL = "What is the capital of France?"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "name": "answer",
    "parameters": SCHEMA,
    "strict": True,
    "description": "Gives the answer",
}

CHOICE: Any = {"type": "function", "name": "answer"}


async def _ended(client: AsyncOpenAI, **fields: Any) -> Response:
    begun = await client.responses.create(model=DEFAULT_MODEL, background=True, temperature=0, **fields)

    async def over() -> Response | None:
        found = await client.responses.retrieve(begun.id)
        return found if found.status not in ("queued", "in_progress") else None

    found = await eventually(over, "the response has ended", limit_s=120, every_s=0.1)
    assert isinstance(found, Response)
    return found


async def test_its_text_is_that_of_the_chat(real: RealFleet) -> None:
    """Polled and streamed, with the chat's own usage; at temperature 0 the model says the same."""
    async with (
        ChatClient(real.fleet.router.url) as fabric,
        AsyncOpenAI(base_url=f"{real.fleet.router.url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = await fabric.chat(DEFAULT_MODEL, [{"role": "user", "content": CAPITAL}], temperature=0, max_tokens=32)
        polled = await _ended(client, input=CAPITAL, max_output_tokens=32)
        stream = await client.responses.retrieve(polled.id, stream=True)
        streamed = check_stream([event.to_dict(mode="json") async for event in stream])
    assert polled.output_text == streamed.output_text == chat.text
    assert polled.usage is not None
    assert polled.usage.output_tokens == chat.usage["completion_tokens"]


async def test_a_format_and_the_choice_of_a_function_reach_the_model(real: RealFleet) -> None:
    """What guides the model's words arrives in the form that vLLM reads; its own refusal comes back as an error."""
    async with AsyncOpenAI(base_url=f"{real.fleet.router.url}/v1", api_key="none", max_retries=0) as client:
        shape: Any = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}}
        formed = await _ended(client, input="Is it?", text=shape, max_output_tokens=64)
        called = await _ended(client, input="Is it?", tools=[TOOL], tool_choice=CHOICE, max_output_tokens=64)
        refused = await _ended(client, input="word " * 4_000)
    assert formed.output_text.lstrip().startswith("{")
    assert [item.type for item in called.output] == ["function_call"], called
    assert (refused.status, refused.error and refused.error.code) == ("failed", "invalid_prompt")
