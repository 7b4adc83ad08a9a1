"""The simulated engine as a process of its own, seen by the unmodified openai SDK and by raw connections."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import openai
import pytest

from tests.support.waiting import eventually
from worker.engines.simulated import chat_prompt, prompt_digest

LIMIT_S = 10.0
PROMPT = [{"role": "user", "content": "Tell me."}]
DIGEST = prompt_digest(chat_prompt([("user", "Tell me.")]))


@contextmanager
def _server(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A simulated engine in a process; yields its URL, which it printed."""
    command = [sys.executable, "-m", "worker.engines.simulated", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("simulated engine on http://"), line
            yield line.split()[-1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An engine at a quick pace, with an adapter."""
    with _server("--model", "sim", "--adapter", "lora", "--ttft-ms", "5", "--tokens-per-s", "1000") as (url, _):
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK, without retries of its own."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        yield client


async def test_the_sdk_gets_a_chat(client: openai.AsyncOpenAI) -> None:
    """A chat answers its prompt, with usage that adds up."""
    chat = await client.chat.completions.create(model="sim", messages=PROMPT)
    assert (chat.choices[0].message.content or "").startswith(DIGEST)
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


async def test_the_sdk_streams_the_text_it_gets_plain(client: openai.AsyncOpenAI) -> None:
    """Role first, then the same text in pieces, the reason it ended, and the usage in a chunk without choices."""
    plain = await client.chat.completions.create(model="sim", messages=PROMPT)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="sim", messages=PROMPT, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage) != ([], None)
    assert chunks[-1].choices == []
    assert plain.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


async def test_the_sdk_streams_several_choices(client: openai.AsyncOpenAI) -> None:
    """Each choice of a stream has its role, its text and its end."""
    plain = await client.chat.completions.create(model="sim", messages=PROMPT, n=3)
    texts = ["", "", ""]
    ends = []
    async for chunk in await client.chat.completions.create(model="sim", messages=PROMPT, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in plain.choices]
    assert ends == [0, 1, 2]


async def test_the_sdk_gets_completions(client: openai.AsyncOpenAI) -> None:
    """Text completions, plain and streamed, are one text."""
    plain = await client.completions.create(model="lora", prompt="Once", max_tokens=20)
    stream = await client.completions.create(model="lora", prompt="Once", max_tokens=20, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == plain.choices[0].text
    assert plain.model == "lora"


async def test_the_sdk_gets_embeddings(client: openai.AsyncOpenAI) -> None:
    """The SDK asks for base64 and floats alike; both are the same unit vectors, in order."""
    packed = await client.embeddings.create(model="sim", input=["a", "b"], dimensions=16)
    floats = await client.embeddings.create(model="sim", input=["a", "b"], dimensions=16, encoding_format="float")
    for one, other in zip(packed.data, floats.data, strict=True):
        assert one.index == other.index
        assert len(one.embedding) == 16
        assert math.isclose(math.hypot(*other.embedding), 1.0)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert packed.data[0].embedding != packed.data[1].embedding


async def test_the_sdk_lists_models_and_adapters(client: openai.AsyncOpenAI) -> None:
    """An adapter is listed with its parent."""
    cards = {model.id: model for model in (await client.models.list()).data}
    assert cards.keys() == {"sim", "lora"}
    assert cards["lora"].to_dict()["parent"] == "sim"


async def test_the_sdk_raises_its_typed_errors(client: openai.AsyncOpenAI) -> None:
    """An unknown model, a wrong type and an ordered failure are the SDK's own exceptions with the engine's words."""
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        await client.chat.completions.create(model="nobody", messages=PROMPT)
    with pytest.raises(openai.BadRequestError, match="valid integer"):
        await client.chat.completions.create(model="sim", messages=PROMPT, max_tokens="x")  # type: ignore[call-overload]
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="sim", messages=PROMPT, extra_body={"sim": {"fail": "500"}})
    with pytest.raises(openai.APIError, match="ordered"):
        async for _ in await client.chat.completions.create(
            model="sim", messages=PROMPT, stream=True, extra_body={"sim": {"fail": "500", "after_tokens": 3}}
        ):
            pass


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{not json", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/embeddings", b'{"input": []}', 400),
        ("POST", "/v1/embeddings", b'{"input": "a", "encoding_format": "png"}', 400),
        ("POST", "/v1/embeddings", b'{"input": "a", "dimensions": 100000}', 400),
        ("POST", "/v1/completions", b'{"prompt": {"text": 1}}', 400),
        ("POST", "/detokenize", b'{"tokens": [-1]}', 400),
        ("POST", "/v1/nothing", b"{}", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/health", b"", 200),
        ("GET", "/version", b"", 200),
    ],
)
async def test_bad_input_is_answered_with_the_error_object(
    url: str, method: str, path: str, body: bytes, status: int
) -> None:
    """Every refusal has the four keys of OpenAI's error object, and its code is the status."""
    async with aiohttp.request(method, url + path, data=body) as answer:
        assert answer.status == status
        if status >= 400:
            error = (await answer.json())["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == status


async def test_tokens_turn_back_into_their_text(url: str) -> None:
    """``/tokenize`` and ``/detokenize`` are inverse, and count what usage counts."""
    async with aiohttp.ClientSession(url) as session:
        async with session.post("/tokenize", json={"prompt": "Grüße, world!"}) as answer:
            tokens = await answer.json()
        async with session.post("/detokenize", json={"tokens": tokens["tokens"]}) as answer:
            assert (await answer.json())["prompt"] == "Grüße, world!"
        async with session.post("/v1/completions", json={"prompt": "Grüße, world!"}) as answer:
            assert (await answer.json())["usage"]["prompt_tokens"] == tokens["count"]
        async with session.post("/tokenize", json={"messages": PROMPT}) as answer:
            assert (await answer.json())["count"] > 1


async def _metrics(url: str) -> dict[str, float]:
    async with aiohttp.request("GET", f"{url}/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def _until_metric(url: str, name: str, value: float) -> None:
    async def reached() -> bool:
        return (await _metrics(url))[name] == value

    await eventually(reached, f"{name} at {value:g}")


async def test_a_repeated_prompt_is_held_by_the_prefix_cache(client: openai.AsyncOpenAI, url: str) -> None:
    """The second time the prompt's blocks count as cached, in usage and in the metrics that vLLM has."""
    prompt = [{"role": "user", "content": "a prompt of many tokens " * 40}]
    cached = []
    before = await _metrics(url)
    for _ in range(2):
        usage = (await client.chat.completions.create(model="sim", messages=prompt)).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    after = await _metrics(url)
    assert cached[0] == 0
    assert cached[1] > 200
    assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] == cached[1]


async def test_a_client_that_leaves_frees_its_slot_for_the_next() -> None:
    """A request that waits for the only slot runs when its holder disconnects, plain or streamed."""
    with _server("--max-num-seqs", "1", "--tokens-per-s", "2") as (url, _):
        async with aiohttp.ClientSession(url) as session:
            for stream in (True, False):
                body = {"messages": PROMPT, "stream": stream, "sim": {"fail": "hang", "after_tokens": 1}}
                holder = asyncio.create_task(_read(session, body))
                await _until_metric(url, "vllm:num_requests_running", 1)
                waiter = asyncio.create_task(_read(session, {"messages": PROMPT, "max_tokens": 1}))
                await _until_metric(url, "vllm:num_requests_waiting", 1)
                await _until_metric(url, "vllm:num_requests_waiting_by_reason", 1)
                holder.cancel()
                assert DIGEST[:4] in (await asyncio.wait_for(waiter, LIMIT_S)).decode()
        assert (await _metrics(url))["vllm:request_success_total"] == 2  # the last of its labels: aborts


async def _read(session: aiohttp.ClientSession, body: dict[str, object]) -> bytes:
    async with session.post("/v1/chat/completions", json=body) as answer:
        return await answer.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_tokens", [0, 2])
async def test_a_connection_closed_as_ordered_is_seen_as_cut_short(url: str, stream: bool, after_tokens: int) -> None:
    """The client notices that the answer is not complete, wherever it was cut."""
    body = {"messages": PROMPT, "stream": stream, "sim": {"fail": "close_midstream", "after_tokens": after_tokens}}
    async with aiohttp.ClientSession(url) as session:
        with pytest.raises(aiohttp.ClientPayloadError):
            await _read(session, body)


async def test_garbage_is_neither_json_nor_events(url: str) -> None:
    """What comes with status 200 cannot be read as an answer."""
    async with aiohttp.ClientSession(url) as session:
        body = await _read(session, {"messages": PROMPT, "sim": {"fail": "garbage"}})
    with pytest.raises(ValueError):
        json.loads(body)


async def test_an_ordered_crash_ends_the_process() -> None:
    """The process is gone as by SIGKILL, in the middle of its stream."""
    with _server("--tokens-per-s", "1000") as (url, process):
        async with aiohttp.ClientSession(url) as session:
            with pytest.raises(aiohttp.ClientError):
                await _read(session, {"messages": PROMPT, "stream": True, "sim": {"fail": "crash", "after_tokens": 2}})
        assert process.wait(LIMIT_S) == -signal.SIGKILL


async def test_an_engine_that_is_never_ready_says_so() -> None:
    """Whatever is asked of it is answered with 503."""
    with _server("--never-ready") as (url, _):
        for path in ("/health", "/v1/models", "/metrics"):
            async with aiohttp.request("GET", url + path) as answer:
                assert answer.status == 503


def test_sigterm_ends_the_process_cleanly() -> None:
    """Exit code 0, soon, even with an idle connection open."""
    with (
        _server("--instant") as (url, process),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        client.models.list()
        process.terminate()
        assert process.wait(LIMIT_S) == 0


def test_options_that_make_no_sense_are_refused_with_a_sentence() -> None:
    """A wrong option ends the process with code 2 and says why."""
    command = [sys.executable, "-m", "worker.engines.simulated", "--max-num-seqs", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 2
    assert "max_num_seqs must be at least 1" in ended.stderr
