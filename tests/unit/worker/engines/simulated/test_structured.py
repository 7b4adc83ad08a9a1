"""What a simulated engine answers to structured-output clients: the vendors' own SDKs, and vLLM's options."""

from __future__ import annotations

import datetime
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any, Literal

import anthropic
import httpx
import httpx2
import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from worker.engines.simulated import Simulation, SimulationSettings
from worker.engines.simulated.api.schema_instances import json_instance
from worker.engines.simulated.app import SimulationApp

ASK: Any = [{"role": "user", "content": "Tell me about a person."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TOOL: Any = {"type": "function", "function": {"name": "save_person", "parameters": SCHEMA}}


class Mood(Enum):
    """An enum, which pydantic puts below $defs."""

    GOOD = "good"
    BAD = "Bad"


class Person(BaseModel):
    """Most of what pydantic's schemas are made of."""

    name: str = Field(min_length=2, max_length=10)
    age: int = Field(ge=0, le=130)
    mood: Mood
    code: str = Field(pattern=r"^[A-Z]{2}-\d{4}$")
    born: datetime.date
    seen: datetime.datetime | None
    number: uuid.UUID
    kind: Literal["a", 1, True]
    share: float = Field(gt=0, lt=1)
    tags: set[str]
    pair: tuple[int, str]
    scores: dict[str, float]
    friends: list[Person]


@pytest.fixture
def app() -> SimulationApp:
    """An engine that takes no time."""
    return SimulationApp(Simulation(SimulationSettings(ttft_ms=0, prefill_us_per_token=0, tokens_per_s=0)))


@pytest.fixture
async def http(app: SimulationApp) -> AsyncIterator[httpx.AsyncClient]:
    """A connection to it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://engine") as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture
def sdk(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    """The vendor's SDK on that connection."""
    return openai.AsyncOpenAI(api_key="none", base_url="http://engine/v1", http_client=http, max_retries=0)


@pytest.fixture
def claude(app: SimulationApp) -> anthropic.AsyncAnthropic:
    """The other vendor's SDK, whose HTTP library is another one."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://engine")  # type: ignore[arg-type]
    return anthropic.AsyncAnthropic(api_key="none", base_url="http://engine", http_client=http, max_retries=0)


async def test_the_sdk_parses_a_chat_into_a_pydantic_model(sdk: openai.AsyncOpenAI) -> None:
    """[F4] ``chat.completions.parse`` gets a model's instance: formats, patterns, bounds, enums, recursion and all."""
    parsed = await sdk.chat.completions.parse(model="sim", messages=ASK, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    again = await sdk.chat.completions.parse(model="sim", messages=ASK, response_format=Person)
    assert again.choices[0].message.content == parsed.choices[0].message.content
    other = await sdk.chat.completions.parse(model="sim", messages=ASK, response_format=Person, seed=7)
    assert other.choices[0].message.content != parsed.choices[0].message.content


async def test_the_sdk_streams_a_pydantic_model(sdk: openai.AsyncOpenAI) -> None:
    """[F4] ``chat.completions.stream`` puts the same instance together from its deltas."""
    async with sdk.chat.completions.stream(model="sim", messages=ASK, response_format=Person) as stream:
        final = await stream.get_final_completion()
    plain = await sdk.chat.completions.parse(model="sim", messages=ASK, response_format=Person)
    assert final.choices[0].message.parsed == plain.choices[0].message.parsed


async def test_the_sdk_parses_a_response_into_a_pydantic_model(sdk: openai.AsyncOpenAI) -> None:
    """[F4] ``responses.parse``, plain and streamed."""
    parsed = await sdk.responses.parse(model="sim", input=ASK, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    async with sdk.responses.stream(model="sim", input=ASK, text_format=Person) as stream:
        assert (await stream.get_final_response()).output_parsed == parsed.output_parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "save_person"}}])
@pytest.mark.parametrize("strict", [None, True])
async def test_a_forced_tool_is_called_with_an_instance_of_its_schema(
    sdk: openai.AsyncOpenAI, choice: Any, strict: bool | None
) -> None:
    """[F4] Plain and streamed, as the SDK accumulates it; with auto the answer may be plain text."""
    tools: Any = [{"type": "function", "function": TOOL["function"] | ({"strict": strict} if strict else {})}]
    plain = await sdk.chat.completions.create(model="sim", messages=ASK, tools=tools, tool_choice=choice)
    call: Any = (plain.choices[0].message.tool_calls or [])[0]
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    async with sdk.chat.completions.stream(model="sim", messages=ASK, tools=tools, tool_choice=choice) as stream:
        streamed: Any = (await stream.get_final_completion()).choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.name == "save_person"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    auto = await sdk.chat.completions.create(model="sim", messages=ASK, tools=tools)
    assert auto.choices[0].message.content


async def test_a_response_calls_a_forced_tool(sdk: openai.AsyncOpenAI) -> None:
    """[F4] ``function_call`` items, plain and streamed, and the turn that gives the tool's output back."""
    tools: Any = [{"type": "function", "name": "save_person", "parameters": SCHEMA, "strict": True}]
    plain = await sdk.responses.create(model="sim", input=ASK, tools=tools, tool_choice="required")
    item = plain.output[0]
    assert item.type == "function_call"
    jsonschema.validate(json.loads(item.arguments), SCHEMA)
    async with sdk.responses.stream(model="sim", input=ASK, tools=tools, tool_choice="required") as stream:
        streamed = (await stream.get_final_response()).output[0]
    assert streamed.type == "function_call"
    assert streamed.arguments == item.arguments
    told: Any = [*ASK, item.model_dump(), {"type": "function_call_output", "call_id": item.call_id, "output": "saved"}]
    assert (await sdk.responses.create(model="sim", input=told, tools=tools)).output_text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "save_person"}])
async def test_a_message_uses_a_forced_tool(claude: anthropic.AsyncAnthropic, choice: Any) -> None:
    """[F4] ``/v1/messages`` with the anthropic SDK, plain and streamed; without tools it says text."""
    tools: Any = [{"name": "save_person", "input_schema": SCHEMA}]
    asked: Any = {"model": "sim", "max_tokens": 500, "messages": ASK, "tools": tools}
    plain = await claude.messages.create(**asked, tool_choice=choice)
    assert plain.stop_reason == "tool_use"
    block = plain.content[0]
    assert block.type == "tool_use"
    jsonschema.validate(block.input, SCHEMA)
    async with claude.messages.stream(**asked, tool_choice=choice) as stream:
        streamed = (await stream.get_final_message()).content[0]
    assert streamed.type == "tool_use"
    assert streamed.input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "saved"}
    told: Any = [
        *ASK,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    text = await claude.messages.create(**asked | {"messages": told})
    assert (text.stop_reason, text.content[0].type) == ("end_turn", "text")
    assert (await claude.messages.count_tokens(model="sim", messages=ASK)).input_tokens > 0


async def test_a_message_thinks_stops_and_is_refused_as_its_sdk_expects(claude: anthropic.AsyncAnthropic) -> None:
    """[F4] Thinking, a limit and an error are told in the API's own words, streamed as well as plain."""
    asked: Any = {"model": "sim", "messages": ASK}
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    plain = await claude.messages.create(**asked, max_tokens=2000, thinking=thinking)
    assert [block.type for block in plain.content] == ["thinking", "text"]
    async with claude.messages.stream(**asked, max_tokens=2000, thinking=thinking) as stream:
        final = await stream.get_final_message()
    seen = {"type", "text", "thinking"}
    assert [one.model_dump(include=seen) for one in final.content] == [
        one.model_dump(include=seen) for one in plain.content
    ]
    assert (await claude.messages.create(**asked, max_tokens=2)).stop_reason == "max_tokens"
    with pytest.raises(anthropic.BadRequestError, match="which is not in tools"):
        await claude.messages.create(**asked, max_tokens=9, tool_choice={"type": "tool", "name": "nothing"})


async def test_log_probabilities_of_a_chat(sdk: openai.AsyncOpenAI) -> None:
    """[F4] One entry a token with as many alternatives as asked for, the same streamed."""
    asked: Any = {"model": "sim", "messages": ASK, "logprobs": True, "top_logprobs": 3, "n": 2}
    plain = await sdk.chat.completions.create(**asked)
    for choice in plain.choices:
        entries = (choice.logprobs and choice.logprobs.content) or []
        assert "".join(entry.token for entry in entries) == choice.message.content
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in entries)
        assert all(bytes(entry.bytes or ()).decode() == entry.token for entry in entries)
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    async for chunk in await sdk.chat.completions.create(**asked, stream=True):
        for part in chunk.choices:
            streamed[part.index] += (part.logprobs and part.logprobs.content) or []
    assert [streamed[0], streamed[1]] == [choice.logprobs and choice.logprobs.content for choice in plain.choices]
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        await sdk.chat.completions.create(model="sim", messages=ASK, top_logprobs=2)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_of_prompts(sdk: openai.AsyncOpenAI, stream: bool) -> None:
    """[F4] Texts and token ids, also those of other tokenizers, each answered n times and in order, as if alone."""
    said: dict[int, str] = {}
    prompts = ["one", "two", "three"]
    asked: Any = {"model": "sim", "max_tokens": 9, "n": 2}
    if stream:
        async for chunk in await sdk.completions.create(prompt=prompts, **asked, stream=True):
            for choice in chunk.choices:
                said[choice.index] = said.get(choice.index, "") + choice.text
    else:
        answer = await sdk.completions.create(prompt=prompts, **asked)
        said = {choice.index: choice.text for choice in answer.choices}
        alone = [await sdk.completions.create(prompt=prompt, **asked) for prompt in prompts]
        assert answer.usage and answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    alone = [await sdk.completions.create(prompt=prompt, **asked) for prompt in prompts]
    assert [said[index] for index in range(6)] == [choice.text for one in alone for choice in one.choices]
    ids: Any = [[9906, 1917, 200, 300], [15339]]
    answer = await sdk.completions.create(model="sim", prompt=ids, max_tokens=1)
    assert len(answer.choices) == 2
    assert len((await sdk.completions.create(model="sim", prompt=ids[0], max_tokens=1)).choices) == 1


async def test_log_probabilities_of_completions(sdk: openai.AsyncOpenAI) -> None:
    """[F4] As evaluation harnesses ask: several prompts, echoed, nothing generated; and streamed."""
    answer = await sdk.completions.create(
        model="sim", prompt=["What?", "Who is it?"], max_tokens=0, echo=True, logprobs=2
    )
    for choice, prompt in zip(answer.choices, ["What?", "Who is it?"], strict=True):
        logprobs = choice.logprobs
        assert choice.text == prompt
        assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.text_offset
        assert "".join(logprobs.tokens) == prompt
        assert logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in logprobs.token_logprobs[1:])
        assert logprobs.top_logprobs and len(logprobs.top_logprobs[1]) == 2
        assert [prompt[at:][:1] for at in logprobs.text_offset] == [token[0] for token in logprobs.tokens]
    plain = await sdk.completions.create(model="sim", prompt="Hi", max_tokens=6, logprobs=1)
    tokens: list[str] = []
    async for chunk in await sdk.completions.create(model="sim", prompt="Hi", max_tokens=6, logprobs=1, stream=True):
        for part in chunk.choices:
            tokens += (part.logprobs and part.logprobs.tokens) or []
    assert plain.choices[0].logprobs
    assert tokens == plain.choices[0].logprobs.tokens


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, r"yes|no"),
        ({"guided_choice": ["yes", "no"]}, r"yes|no"),
        ({"structured_outputs": {"regex": r"^\d{3}-[a-z]+@x\.(com|org)$"}}, r"\d{3}-[a-z]+@x\.(com|org)"),
        ({"guided_grammar": 'root ::= "red" | "blue " [0-9]'}, r"red|blue \d"),
        ({"guided_json": json.dumps(SCHEMA)}, r'\{"name": ".*", "age": \d+\}'),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"name": ".*", "age": \d+\}'),
        ({"response_format": {"type": "json_object"}}, r'\{"answer": ".*"\}'),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_options_of_vllm_for_structured_outputs(
    http: httpx.AsyncClient, path: str, option: dict[str, Any], match: str
) -> None:
    """[F4] Chats and completions say what the option allows, and nothing else."""
    request = {"messages": ASK, "prompt": "Say.", "max_tokens": 200} | option
    answer = await http.post(path, json=request)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert re.fullmatch(match, text), text


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}, "not a valid"),
        ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 4}}, "minimum"),
        ({"guided_json": {"$ref": "http://169.254.169.254/schema"}}, "169.254.169.254"),
        ({"guided_json": {"type": "string", "not": {}}}, "no instance"),
        ({"guided_regex": "(("}, "guided_regex"),
        ({"guided_regex": "a{200000}"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "give one of them"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "gone"}}}, "gone"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2, "logprobs": 2}, "logprobs"),
    ],
)
async def test_what_is_not_simulated_is_refused_by_name(
    http: httpx.AsyncClient, option: dict[str, Any], named: str
) -> None:
    """[F4] Nothing that changes the answer's shape is ignored silently, and a schema without instances is a 400."""
    answer = await http.post("/v1/chat/completions", json={"messages": ASK} | option)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


async def test_a_broken_off_instance_goes_on_behind_its_beginning(http: httpx.AsyncClient) -> None:
    """[F4] ``continue_final_message`` with a schema gives the rest of the same instance."""
    request: dict[str, Any] = {"messages": ASK, "response_format": FORMAT}
    whole = (await http.post("/v1/chat/completions", json=request)).json()["choices"][0]["message"]["content"]
    assert jsonschema.validate(json.loads(whole), SCHEMA) is None
    said = {"role": "assistant", "content": whole[:11]}
    rest = request | {"messages": [*ASK, said], "continue_final_message": True, "add_generation_prompt": False}
    assert (await http.post("/v1/chat/completions", json=rest)).json()["choices"][0]["message"]["content"] == whole[11:]


async def test_json_mode_follows_a_schema_in_the_prompt(http: httpx.AsyncClient) -> None:
    """[F4] Clients without schemas of their own write one into the prompt, for the model to read."""
    asked = [{"role": "system", "content": f"Answer as JSON:\n```\n{json.dumps(SCHEMA, indent=2)}\n```\n{{x"}, *ASK]
    request = {"messages": asked, "response_format": {"type": "json_object"}}
    text = (await http.post("/v1/chat/completions", json=request)).json()["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(text), SCHEMA)


SCHEMAS: list[Any] = [
    {},
    {"type": ["string", "null"]},
    {"enum": [{"a": [1, 2]}, None, 'é"x\\']},
    {"type": "array", "uniqueItems": True, "minItems": 4, "items": {"enum": [1, 2, 3, 4]}},
    {"type": "array", "contains": {"const": 5}, "items": {"type": "integer", "minimum": 4, "maximum": 7}},
    {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
    {"type": "object", "patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}},
    {"type": "string", "format": "email", "minLength": 30},
    {"type": "integer", "not": {"minimum": 0}},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": -5, "maximum": -1},
    {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "properties": {"a": {}, "b": {}}},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}},
    {
        "type": "object",
        "properties": {"a b": {"type": "boolean"}, "é": {"type": "null"}},
        "required": ["a b", "é", "z"],
    },
    Person.model_json_schema(),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
@settings(max_examples=5, deadline=None)
@given(key=st.text(max_size=4))
def test_whatever_the_key_an_instance_is_one(schema: Any, key: str) -> None:
    """[F4] Many kinds of schemas, each instance checked by a validator of its own, and drawn alike the second time."""
    text = json_instance(json.dumps(schema), key)
    jsonschema.validate(json.loads(text), schema)
    assert json_instance(json.dumps(schema), key) == text


async def test_a_hostile_schema_costs_little(http: httpx.AsyncClient) -> None:
    """[F4] Deep nesting, endless recursion and exploding patterns are refused within seconds."""
    deep: Any = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "array", "items": deep, "minItems": 1}
    endless = {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/a"}}}},
    }
    began = time.thread_time()
    for schema in (
        deep,
        endless,
        {"type": "string", "minLength": 10_000_000},
        {"pattern": "(.*a){9000}", "type": "string"},
    ):
        answer = await http.post("/v1/chat/completions", json={"messages": ASK, "guided_json": schema})
        assert answer.status_code == 400, answer.text[:200]
    assert time.thread_time() - began < 8
