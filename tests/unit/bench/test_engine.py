"""The fake engine speaks as vLLM's OpenAI server does, as far as clients and workers look."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from bench.systems import fake_engine
from bench.windows import SCENARIOS, System, measured
from worker.engines.http import HttpEngine


@pytest_asyncio.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    async with fake_engine(tmp_path, "--models", "3") as (port, _):
        yield port


def chat(line: str = "", **fields: Any) -> dict[str, Any]:
    return {"model": "sim-2", "max_tokens": 3, "messages": [{"role": "user", "content": f"Hello {line}"}], **fields}


async def test_a_worker_attaches_to_it(port: int) -> None:
    """Health, models and counters are what a worker asks an engine for."""
    engine = HttpEngine(f"http://127.0.0.1:{port}")
    assert await engine.answers_well()
    assert await engine.list_models() == ("sim", "sim-1", "sim-2")
    before = await engine.progress()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await client.post("/v1/chat/completions", json=chat())
    assert before is not None
    assert await engine.progress() != before
    await engine.stop(1)


async def test_a_plain_chat_has_its_marker_in_every_token(port: int) -> None:
    """The text belongs to the request that it answers, and takes the time that its prompt says."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        begun = time.monotonic()
        answer = await client.post("/v1/chat/completions", json=chat("[bench 00000000000000ab 50000 0 2]"))
        took_s = time.monotonic() - begun
        other = await client.post("/v1/chat/completions", json=chat())
    found = answer.json()
    assert found["choices"][0]["message"]["content"] == "00000000000000ab.0 00000000000000ab.1 "
    assert (found["model"], found["usage"]["completion_tokens"]) == ("sim-2", 2)
    assert took_s >= 0.05
    assert other.json()["usage"]["completion_tokens"] == 3


async def test_a_stream_brings_a_token_in_each_event(port: int) -> None:
    """Role, tokens, usage if asked for, [DONE]; the tokens come with the engine's steps."""
    body = chat("[bench 00000000000000cd 1000 30000 4]", stream=True, stream_options={"include_usage": True})
    times, events = [], []
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line:
                times.append(time.monotonic())
                events.append(line.removeprefix("data: "))
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks.pop()["usage"]["completion_tokens"] == 4
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == [
        "",
        *(f"00000000000000cd.{k} " for k in range(4)),
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert times[-1] - times[0] >= 0.06


@pytest.mark.parametrize("path", ["/v1/unknown", "/tokenize"])
async def test_what_it_has_not_is_not_found(port: int, path: str) -> None:
    """It claims nothing that a worker would then rely on."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.post(path, json={})).status_code == 404


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_every_load_is_answered_rightly(port: int, scenario: Any) -> None:
    """Engine and load generator agree in every scenario of the benchmark."""
    one = await measured(scenario, System("direct", port, {}), speed=20)
    assert one.load.tokens > 0
