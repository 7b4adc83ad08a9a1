"""``openai.responses.create(background=True)`` with the unmodified SDK against a real fleet of two Routers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response

from queue_schemas import JobId, ShardKeys
from tests.runs.responses import resume_responses
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.queue import parse_record
from tests.support.responses import check_stream
from tests.support.servers import Server
from tests.support.waiting import eventually

in_module = pytest.mark.asyncio(loop_scope="module")

KEY, RIVAL = "sk-of-acme", "sk-of-rival"
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(module_valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One fleet for all: two Routers with API keys, two workers whose words are drawn anew for each attempt."""
    keys = ",".join(f"{hashlib.sha256(key.encode()).hexdigest()}:{key.rsplit('-')[-1]}" for key in (KEY, RIVAL))
    router = {"api_keys": keys, "responses": "engine"}
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey, router=router) as fleet:
        fleet.session.headers["authorization"] = f"Bearer {KEY}"
        second = fleet.another_router("router-2", api_keys=keys, responses="chat")
        second.process.start()
        await fleet.up(workers=2, sim_mode="text", sim_nondeterministic=True, sim_answer_tokens=40)
        await second.ready()
        fleet.second = second  # type: ignore[attr-defined]
        yield fleet


def _client(role: Role, key: str = KEY) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{role.url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The SDK at the first Router, as its users make it, but for the retries, which would hide errors."""
    async with _client(fleet.router) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The SDK at the second Router."""
    async with _client(fleet.second) as client:  # type: ignore[attr-defined]
        yield client


async def ended(client: AsyncOpenAI, response: Response) -> Response:
    """The response once it has ended, asked for as the vendor's guide does it."""

    async def is_over() -> Response | None:
        found = await client.responses.retrieve(response.id)
        return found if found.status not in ("queued", "in_progress") else None

    found = await eventually(is_over, "the response has ended", every_s=0.05, limit_s=20)
    assert found is not None
    return found


def _of_job(fleet: Fleet, response: Response, name: str) -> str:
    """A field of its job's record."""
    key = ShardKeys(0).job(JobId(response.id.removeprefix("resp_")))
    return parse_record(fleet.server.ask("HGET", key, "record"))[name]


async def events_of(client: AsyncOpenAI, name: str, after: int | None = None) -> list[dict[str, Any]]:
    """Its events behind one, to the end."""
    options = {} if after is None else {"starting_after": after}
    stream = await client.responses.retrieve(name, stream=True, **options)  # type: ignore[call-overload]
    return [event.to_dict(mode="json") async for event in stream]


@in_module
async def test_it_is_created_polled_and_complete(client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    """Queued at once, complete in time, at any Router; metadata, usage and text are there; the input is listed."""
    begun = await client.responses.create(
        model=MODEL, input="Tell me a story.", background=True, metadata={"a": "b"}, instructions="Be brief."
    )
    assert (begun.status, begun.background, begun.output) == ("queued", True, [])
    found = await ended(other, begun)
    assert (found.status, found.metadata, found.instructions) == ("completed", {"a": "b"}, "Be brief.")
    assert found.usage is not None
    assert found.usage.output_tokens * 4 == len(found.output_text)
    assert await ended(client, begun) == found
    items = await client.responses.input_items.list(begun.id)
    assert [item.type for item in items.data] == ["message"]


@in_module
async def test_a_response_can_be_resumed_behind_any_event(client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    """From any number, at any Router, as often as wanted: together they are the whole, which is the persisted
    result."""
    stream = await client.responses.create(model=MODEL, input="Once upon", background=True, stream=True)
    whole = [event.to_dict(mode="json") async for event in stream]
    response = check_stream(whole)
    assert await client.responses.retrieve(response.id) == response
    draw = random.Random(5)
    for _ in range(10):
        after = draw.randrange(len(whole))
        reader = draw.choice([client, other])
        assert whole[: after + 1] + await events_of(reader, response.id, after) == whole
    assert await events_of(other, response.id) == whole


@in_module
async def test_a_client_that_loses_its_stream_continues_at_another_router(
    client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    """The connection breaks while the model answers: the response runs on, and another Router streams the rest live."""
    extra = {"ignore_eos": True, "sim": {"fail": "slow", "delay_ms": 40}}
    seen: list[dict[str, Any]] = []
    stream = await client.responses.create(
        model=MODEL, input="Go on", background=True, stream=True, max_output_tokens=150, extra_body=extra
    )
    async for event in stream:
        seen.append(event.to_dict(mode="json"))
        if len(seen) == 20:
            break
    await stream.close()
    name, after = seen[0]["response"]["id"], seen[-1]["sequence_number"]
    assert (await other.responses.retrieve(name)).status == "in_progress"
    response = check_stream(seen + await events_of(other, name, after))
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )


@in_module
async def test_reasoning_and_function_calls(client: AsyncOpenAI) -> None:
    """Reasoning and calls are items of their own; the answer to a call continues the conversation."""
    thought = await ended(
        client,
        await client.responses.create(model=MODEL, input="Hm?", background=True, reasoning={"effort": "low"}),
    )
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    asked: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    called = await ended(
        client, await client.responses.create(model=MODEL, input=asked, background=True, tools=[WEATHER])
    )
    (call,) = called.output
    assert call.type == "function_call"
    assert (call.name, bool(json.loads(call.arguments))) == ("weather", True)
    asked += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    final = await ended(
        client, await client.responses.create(model=MODEL, input=asked, background=True, tools=[WEATHER])
    )
    assert final.output_text


@in_module
async def test_a_response_is_cancelled_once(client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    """A cancelled response shows it everywhere, also to its followers; one that has ended stays as it is."""
    long = {"ignore_eos": True}
    begun = await client.responses.create(
        model=MODEL, input="Long", background=True, max_output_tokens=3_000, extra_body=long
    )
    following = asyncio.create_task(events_of(other, begun.id))

    async def runs() -> bool:
        return (await client.responses.retrieve(begun.id)).status == "in_progress"

    await eventually(runs, "it runs")
    cancelled = await other.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    assert cancelled.error is not None
    last = check_stream(await following)
    assert last.status == "cancelled"
    assert await client.responses.cancel(begun.id) == await client.responses.retrieve(begun.id) == cancelled
    done = await ended(client, await client.responses.create(model=MODEL, input="Short", background=True))
    assert (await client.responses.cancel(done.id)).status == "completed"


@in_module
async def test_a_deleted_response_or_another_tenants_is_not_found(fleet: Fleet, client: AsyncOpenAI) -> None:
    """The same error as for one that never existed, on every operation."""
    mine = await client.responses.create(model=MODEL, input="Mine", background=True)
    async with _client(fleet.router, RIVAL) as rival:
        for call in (
            rival.responses.retrieve(mine.id),
            rival.responses.cancel(mine.id),
            rival.responses.delete(mine.id),
            rival.responses.input_items.list(mine.id),
            rival.responses.retrieve(mine.id, stream=True),
        ):
            with pytest.raises(openai.NotFoundError) as theirs:
                await call
    assert (await ended(client, mine)).status == "completed"
    await client.responses.delete(mine.id)
    for name in (mine.id, "resp_0-" + "0" * 32, "resp_nonsense", "msg_1"):
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.retrieve(name)
        assert gone.value.body == {
            **theirs.value.body,
            "message": f"there is no response '{name}', or it is not kept any more",
        }  # type: ignore[dict-item]


@in_module
async def test_bad_requests_are_errors_of_the_sdk(client: AsyncOpenAI) -> None:
    """Each names its parameter; an unknown model and an unknown event, too."""
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"store": False}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model=MODEL, input="x", background=True, **fields)  # type: ignore[call-overload]
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.responses.create(model="gpt-9", input="x", background=True)
    assert unknown.value.code == "model_not_found"
    begun = await client.responses.create(model=MODEL, input="x", background=True)
    with pytest.raises(openai.BadRequestError):
        await client.responses.retrieve(begun.id, extra_query={"stream": "true", "starting_after": -1})


@in_module
async def test_an_engine_that_refuses_makes_a_failed_response(client: AsyncOpenAI) -> None:
    """The engine's own message is in the error."""
    begun = await client.responses.create(model=MODEL, input="x" * 400_000, background=True)
    found = await ended(client, begun)
    assert found.status == "failed"
    assert found.error is not None
    assert found.error.code == "invalid_prompt"
    assert "maximum context length" in found.error.message


@in_module
async def test_foreground_responses(client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    """From the engine as it is, and built from a chat where the Router's setting says so; plain and streamed."""
    for waiting in (client, other):
        plain = await waiting.responses.create(model=MODEL, input="Hi", max_output_tokens=8)
        assert (plain.status, len(plain.output_text)) == ("incomplete", 32)
        stream = await waiting.responses.create(model=MODEL, input="Hi", max_output_tokens=8, stream=True)
        assert check_stream([event.to_dict(mode="json") async for event in stream]).status == "incomplete"


def test_the_synchronous_sdk(fleet: Fleet) -> None:
    """The same with the synchronous client."""
    with OpenAI(base_url=f"{fleet.router.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        with client.responses.create(model=MODEL, input="Hi", background=True, stream=True) as stream:
            events = [event.to_dict(mode="json") for event in stream]
        response = check_stream(events)
        assert client.responses.retrieve(response.id).output_text == response.output_text
        with client.responses.stream(response_id=response.id, starting_after=5) as stream:
            assert [event.sequence_number for event in stream] == list(range(6, len(events)))


@in_module
async def test_a_killed_worker_leaves_no_gap_and_no_repeat(
    fleet: Fleet, client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    """At a temperature above 0, SIGKILL in the middle: a follower sees one stream, and it is the persisted result."""
    # The words of this engine say where they stand, so a gap or a repeat would show; attempts never say the same.
    slowly = {"ignore_eos": True, "sim": {"fail": "slow", "delay_ms": 50}}
    options: Any = {"temperature": 0.9, "max_output_tokens": 150, "extra_body": slowly}
    begun = [
        await client.responses.create(model=MODEL, input=f"Tell {number}", background=True, **options)
        for number in range(4)
    ]
    streams: list[list[dict[str, Any]]] = []

    async def follow(reader: AsyncOpenAI, name: str) -> None:
        streams.append(seen := [])
        async for event in await reader.responses.retrieve(name, stream=True):
            seen.append(event.to_dict(mode="json"))  # noqa: PERF401 - looked at meanwhile

    async with asyncio.TaskGroup() as tasks:
        for one in begun:
            for reader in (client, other):
                tasks.create_task(follow(reader, one.id))
        await eventually(lambda: len(streams) == 8 and min(map(len, streams)) > 20, "all of them say something")
        owner = _of_job(fleet, begun[0], "owner").partition(".")[0]
        next(worker for worker in fleet.workers if worker.name == owner).process.kill()
    by_response = {one.id: [seen for seen in streams if seen[0]["response"]["id"] == one.id] for one in begun}
    for name, (left, right) in by_response.items():
        assert left == right
        response = check_stream(left)
        assert response == await client.responses.retrieve(name)
        assert len(response.output_text) == 600
        assert response.usage is not None
        assert response.usage.output_tokens == 150
    assert "2" in [_of_job(fleet, one, "attempts") for one in begun]


@in_module
async def test_pieces_from_any_router_are_the_persisted_response(fleet: Fleet) -> None:
    """Forty resumes behind random events while a worker is killed, over raw HTTP; then nothing is left of them."""
    await asyncio.gather(*(worker.start() for worker in fleet.workers if not worker.process.running))
    await fleet.until_served(2)
    routers = [fleet.router, fleet.second]  # type: ignore[attr-defined]
    resumed, _ = await resume_responses(fleet, routers, random.Random(40), resumes=40, responses=4, tokens=100, kills=1)
    assert resumed >= 40
