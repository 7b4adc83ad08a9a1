"""A real model's stream whose worker is killed: it goes on as vLLM itself goes on behind the same text."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from inferq.vllm_setup import DEFAULT_MODEL
from tests.support.fleet import Role
from tests.support.sse import read_data
from tests.support.waiting import eventually
from tests.vllm.conftest import RealFleet, until_engine_ready

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(2400)]

MAX_TOKENS = 60
STORY = [{"role": "user", "content": "Tell me about the city of Paris."}]
PROMPT = "The city of Paris is known for"


@dataclass(slots=True)
class Seen:
    """What the client of one stream saw."""

    text: str = ""
    ids: set[str] = field(default_factory=set)
    roles: int = 0
    finishes: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    done: int = 0


async def _stream(real: RealFleet, path: str, body: dict[str, Any], seen: Seen) -> None:
    asked = {"model": DEFAULT_MODEL, "stream": True, "stream_options": {"include_usage": True}, **body}
    headers = {"x-request-id": "survivor"}
    async with real.fleet.session.post(real.fleet.router.url + path, json=asked, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        async for data in read_data(answer):
            if data == "[DONE]":
                seen.done += 1
                continue
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            seen.ids.add(chunk["id"])
            seen.usage = chunk.get("usage") or seen.usage
            for choice in chunk["choices"]:
                said = choice.get("delta") or {"content": choice.get("text")}
                seen.text += said.get("content") or ""
                seen.roles += bool(said.get("role"))
                seen.finishes += [choice["finish_reason"]] if choice.get("finish_reason") else []


async def _directly(real: RealFleet, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = {"model": DEFAULT_MODEL, "temperature": 0, **body}
    async with real.fleet.session.post(url + path, json=asked) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def _runner(real: RealFleet) -> Role:
    """The worker that runs something."""

    async def found() -> Role | None:
        for worker in real.fleet.workers:
            status, page = await worker.get("/status")
            if status == 200 and json.loads(page)["running"]:
                return worker
        return None

    runner = await eventually(found, "a worker runs it", limit_s=30)
    assert isinstance(runner, Role)
    return runner


def _delivered(router_log: str) -> int:
    """Characters that the Router had delivered when it had the stream go on."""
    lines = [json.loads(line) for line in router_log.splitlines() if line.startswith("{")]
    resumed = [line["delivered"] for line in lines if line.get("event") == "stream_resumed"]
    assert resumed, "the stream was lost and resumed"
    return int(resumed[-1])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_goes_on_as_vllm_does_behind_the_same_text(real: RealFleet, path: str) -> None:
    """Its worker and that one's engine are killed half way. The client sees one answer, whose rest is what the other
    vLLM says when it is given the beginning; usage, limits, role and id are those of one answer."""
    is_chat = path == "/v1/chat/completions"
    body: dict[str, Any] = {"messages": STORY} if is_chat else {"prompt": PROMPT}
    await real.fleet.until_served(2, DEFAULT_MODEL)
    seen = Seen()
    asked = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    streaming = asyncio.create_task(_stream(real, path, body | asked, seen))
    await eventually(lambda: len(seen.text) > 30, "some of it has come", limit_s=60)
    victim = await _runner(real)
    victim.process.kill_group()
    async with asyncio.timeout(120):
        await streaming
    victim.process.start()
    try:
        at = _delivered(real.fleet.router.process.log_text())
        assert 30 <= at < len(seen.text)
        begun = seen.text[:at]
        other = next(url for url, worker in zip(real.engines, real.fleet.workers, strict=True) if worker is not victim)
        if is_chat:
            rest = {"messages": [*STORY, {"role": "assistant", "content": begun}]}
            rest |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            rest = {"prompt": PROMPT + begun}
        prompt_tokens = (await _directly(real, other, path, body | {"max_tokens": 1}))["usage"]["prompt_tokens"]
        begun_tokens = (await _directly(real, other, path, rest | {"max_tokens": 1}))["usage"][
            "prompt_tokens"
        ] - prompt_tokens
        direct = await _directly(
            real, other, path, rest | {"max_tokens": MAX_TOKENS - begun_tokens, "ignore_eos": True}
        )
        choice = direct["choices"][0]
        assert seen.text == begun + (choice["message"]["content"] if is_chat else choice["text"])
        assert (seen.done, len(seen.ids), seen.roles, seen.finishes) == (1, 1, int(is_chat), ["length"])
        assert seen.usage["prompt_tokens"] == prompt_tokens
        assert seen.usage["completion_tokens"] == MAX_TOKENS
    finally:
        await until_engine_ready(victim)
