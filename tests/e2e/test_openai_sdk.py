"""The unmodified ``openai`` SDK against a real fleet: every answer and every error as its own types."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.support.fleet import MODEL, Fleet
from tests.support.servers import Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "sk-of-acme"
MAX_BODY = 64 * 1024
SAY = "The capital of France is Paris."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(module_valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One fleet for all: a Router with API keys and a small body limit, two workers."""
    keys = f"{hashlib.sha256(KEY.encode()).hexdigest()}:acme"
    router = {"api_keys": keys, "max_body_bytes": MAX_BODY, "pools": "known-but-unserved", "max_tenant_jobs": 200}
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey, router=router) as fleet:
        fleet.session.headers["authorization"] = f"Bearer {KEY}"
        yield await fleet.up(workers=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The SDK as its users make it, but for the retries, which would hide errors."""
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


async def test_chat(client: AsyncOpenAI) -> None:
    """A chat completion with its text, model and usage."""
    answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": SAY}])
    assert answer.choices[0].message.content == SAY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None and answer.usage.completion_tokens > 0


async def test_streamed_chat(client: AsyncOpenAI) -> None:
    """Chunks that add up to the text, the role first, a finish reason last, then the usage that was asked for."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": SAY}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == SAY
    assert deltas[-1].finish_reason == "stop"
    assert len(deltas) > 3
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_streaming_helper(client: AsyncOpenAI) -> None:
    """The SDK's own accumulator accepts our stream."""
    async with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": SAY}]) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == SAY
    assert "content.delta" in events and "content.done" in events


async def test_completions(client: AsyncOpenAI) -> None:
    """Text completions, plain and streamed."""
    plain = await client.completions.create(model=MODEL, prompt=SAY, max_tokens=50)
    stream = await client.completions.create(model=MODEL, prompt=SAY, max_tokens=50, stream=True)
    streamed = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    assert plain.choices[0].text == streamed == SAY


async def test_embeddings(client: AsyncOpenAI) -> None:
    """Vectors in order (the SDK asks for base64 by itself), the same text twice the same vector."""
    answer = await client.embeddings.create(model=MODEL, input=[SAY, "something else", SAY])
    first, second, third = (item.embedding for item in answer.data)
    assert first == third != second
    assert len(first) > 8
    numbers = await client.embeddings.create(model=MODEL, input=SAY, encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(first, abs=1e-6)


async def test_models(client: AsyncOpenAI) -> None:
    """Listed once though two workers serve it, with those that are only declared; each can be retrieved."""
    listed = [model.id async for model in client.models.list()]
    assert sorted(listed) == ["known-but-unserved", MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no-such-model")


async def test_concurrent_answers_are_each_their_own(client: AsyncOpenAI) -> None:
    """Sixty chats at once, plain and streamed: none gets another's text."""

    async def ask(number: int) -> bool:
        text = f"message {number} " + "x" * (number % 7)
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": text}]
        if number % 2:
            plain = await client.chat.completions.create(model=MODEL, messages=messages)
            return plain.choices[0].message.content == text
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        return "".join(pieces) == text

    assert all(await asyncio.gather(*(ask(number) for number in range(60))))


async def test_request_ids_come_back(client: AsyncOpenAI) -> None:
    """The caller's own request id, or one of ours."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": SAY}], extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    listed = await client.models.with_raw_response.list()
    assert listed.headers["x-request-id"]


async def test_parameters_the_sdk_does_not_know_reach_the_engine(client: AsyncOpenAI) -> None:
    """Extra fields travel in the body, which nobody re-encodes: the simulated engine obeys its own."""
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": SAY}], extra_body={"sim": {"fail": "500"}}
        )


# Errors


async def test_400(client: AsyncOpenAI) -> None:
    """A request that the engine refuses comes back as the engine said it."""
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": SAY}], temperature=-1)
    assert refused.value.type and refused.value.message


async def test_400_for_what_is_no_json(fleet: Fleet) -> None:
    """Malformed bodies are told apart before they reach a queue."""
    for body in (b"{", b"[]", b'"text"', b"{}", b'{"model": 7}', b"\xff\xfe", b""):
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", data=body) as answer:
            assert answer.status == 400, body
            assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}


async def test_401(fleet: Fleet) -> None:
    """A wrong key, and none at all."""
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key="sk-wrong", max_retries=0) as outsider:
        with pytest.raises(openai.AuthenticationError) as refused:
            await outsider.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": SAY}])
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await outsider.models.list()
    async with httpx.AsyncClient() as bare:
        assert (await bare.get(f"{fleet.router.url}/v1/models")).status_code == 401


async def test_404(client: AsyncOpenAI) -> None:
    """A model nobody has heard of, and a path that is no inference path."""
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": SAY}])
    assert refused.value.code == "model_not_found"
    assert "gpt-9" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        await client.post("/load_lora_adapter", body={}, cast_to=object)


async def test_413(client: AsyncOpenAI) -> None:
    """A body over the limit is refused with the limit."""
    with pytest.raises(openai.APIStatusError) as refused:
        await client.embeddings.create(model=MODEL, input="x" * (MAX_BODY + 1))
    assert refused.value.status_code == 413
    assert refused.value.code == "request_too_large"


async def test_429(client: AsyncOpenAI, fleet: Fleet) -> None:
    """A tenant with too many requests waiting is told to come back, and when."""
    waiting = [
        asyncio.create_task(
            client.embeddings.create(
                model="known-but-unserved", input="x", extra_headers={"x-inferq-deadline-ms": "20000"}
            )
        )
        for _ in range(200)
    ]

    async def waits(count: int) -> bool:
        return bool((await fleet.depth("known-but-unserved"))["waiting"] == count)

    try:
        await eventually(lambda: waits(200), "200 requests wait", limit_s=20)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.embeddings.create(model=MODEL, input="x")
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert refused.value.code == "over_capacity"
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await eventually(lambda: waits(0), "those whose clients left are cancelled", limit_s=20)


async def test_504(client: AsyncOpenAI) -> None:
    """A known model without a worker queues until the deadline that the caller gave."""
    with pytest.raises(openai.InternalServerError) as late:
        await client.chat.completions.create(
            model="known-but-unserved",
            messages=[{"role": "user", "content": SAY}],
            extra_headers={"x-inferq-deadline-ms": "300"},
        )
    assert late.value.status_code == 504
    assert late.value.code == "deadline_exceeded"


async def test_a_failing_engine_is_retried_elsewhere(client: AsyncOpenAI) -> None:
    """One worker's engine answers 500, the other one does the job: the client sees one good answer."""
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": SAY}],
        extra_body={"sim": {"fail": "500", "on": "worker-1"}},
    )
    assert answer.choices[0].message.content == SAY
