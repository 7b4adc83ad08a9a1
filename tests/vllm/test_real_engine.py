"""Real vLLM through the whole fabric: the same text, shared work, and an abort that reaches the engine."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp
import pytest

from inferq.chat.client import Answer, ChatClient
from inferq.vllm_setup import DEFAULT_MODEL
from scheduling.slots import EngineLoad
from tests.support.waiting import eventually
from worker.core import read_load

from .conftest import RealFleet

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(2400)]

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
OTHER_WORDS = [
    [{"role": "user", "content": text}]
    for text in (
        "The capital of France is",
        "Which city is the capital of France? Answer in English.",
        "Complete the sentence: The capital city of France is called",
    )
]
PROMPTS = 40


async def _complete(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(f"{url}/v1/completions", json={"model": DEFAULT_MODEL, **body}) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def _streamed(client: ChatClient, asked: list[dict[str, str]] = CAPITAL, **parameters: object) -> Answer:
    answer = Answer()
    async for _ in client.stream_chat(answer, DEFAULT_MODEL, asked, **parameters):
        pass
    return answer


async def _running(real: RealFleet) -> int:
    """Requests that both engines run now, by vLLM's own count."""
    total = 0
    for url in real.engines:
        async with real.fleet.session.get(f"{url}/metrics") as answer:
            found = re.findall(r"^vllm:num_requests_running\{.*\} ([\d.e+]+)$", await answer.text(), re.MULTILINE)
            assert found, "vLLM exports the number of running requests"
            total += sum(round(float(value)) for value in found)
    return total


async def test_vllm_says_what_its_cache_holds_and_stores(real: RealFleet) -> None:
    """By this a worker knows when it has forgotten what it served (``scheduling.cache_age``)."""
    text = "One, two, three. " * 64

    async def load() -> EngineLoad:
        async with real.fleet.session.get(f"{real.engines[0]}/metrics") as answer:
            found = read_load(await answer.read())
        assert found is not None
        return found

    before = await load()
    for _ in range(2):
        await _complete(real.fleet.session, real.engines[0], {"prompt": text, "max_tokens": 8, "ignore_eos": True})
    after = await load()
    assert after.cache_tokens is not None and after.cache_tokens == before.cache_tokens > 10_000
    figures = [(one.generated, one.prefix_queries, one.prefix_hits) for one in (before, after)]
    generated, looked_up, hits = (int(now or 0) - int(was or 0) for was, now in zip(*figures, strict=True))
    assert generated == 16
    assert looked_up > 2 * 128
    assert looked_up // 2 - 32 <= hits < looked_up // 2  # all but the last blocks of the second


async def test_a_streamed_chat_through_the_queue_knows_the_capital_of_france(real: RealFleet) -> None:
    """The answer of a real model arrives piece by piece through Router, Redis and worker."""
    async with ChatClient(real.fleet.router.url) as client:
        answers = [await _streamed(client, asked, temperature=0, max_tokens=32) for asked in (CAPITAL, *OTHER_WORDS)]
    # What so small a model says to one question depends on the processor's rounding.
    assert any("Paris" in answer.text for answer in answers), [answer.text for answer in answers]
    for answer in answers:
        assert answer.finish_reason in ("stop", "length")
        assert 0 < answer.usage["completion_tokens"] <= 32


async def test_the_text_is_what_vllm_says_when_asked_directly(real: RealFleet) -> None:
    """At temperature 0 the fabric changes nothing: plain and streamed, the same text and the same usage."""
    asked: dict[str, object] = {"temperature": 0, "max_tokens": 48}
    async with ChatClient(real.fleet.router.url) as fabric, ChatClient(real.engines[0]) as direct:
        plain, plain_direct = (
            await fabric.chat(DEFAULT_MODEL, CAPITAL, **asked),
            await direct.chat(DEFAULT_MODEL, CAPITAL, **asked),
        )
        streamed, streamed_direct = await _streamed(fabric, **asked), await _streamed(direct, **asked)
    assert plain.text == plain_direct.text == streamed.text == streamed_direct.text != ""
    assert plain.usage == plain_direct.usage
    assert streamed.usage == streamed_direct.usage
    assert plain.finish_reason == streamed.finish_reason == plain_direct.finish_reason


async def test_two_workers_share_forty_prompts_and_mix_none_up(real: RealFleet) -> None:
    """Each of 40 concurrent prompts gets its own right answer, and both workers had a part in it."""
    prompts = [f"Memo {number * 7919:06d}. The capital of France is" for number in range(PROMPTS)]

    async def ask(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True}
        found = await _complete(real.fleet.session, real.fleet.router.url, body)
        return str(found["choices"][0]["text"])

    before = [await _served(real, number) for number in range(2)]
    texts = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(prompt), "the answer to another prompt"
        assert "Paris" in text.removeprefix(prompt)

    async def counted() -> bool:
        served[:] = [await _served(real, number) - before[number] for number in range(2)]
        return sum(served) == PROMPTS

    served: list[int] = []
    await eventually(counted, "each answer is counted by the worker that gave it")
    assert min(served) >= 1, f"one worker did all the work: {served}"


async def test_a_client_that_leaves_frees_the_engine(real: RealFleet) -> None:
    """When a client closes its stream, vLLM aborts the request instead of finishing 1,500 tokens for nobody."""
    await eventually(lambda: _idle(real), "the engines are idle before", limit_s=30)
    body = {"model": DEFAULT_MODEL, "prompt": "Once", "max_tokens": 1_500, "ignore_eos": True, "stream": True}
    async with real.fleet.session.post(f"{real.fleet.router.url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        await answer.content.readline()
        assert await _running(real) == 1
        answer.close()
    await eventually(lambda: _idle(real), "the abort reaches the engine", limit_s=10, every_s=0.1)


async def _idle(real: RealFleet) -> bool:
    return await _running(real) == 0


async def _served(real: RealFleet, number: int) -> int:
    """Jobs that a worker has finished, by its own count."""
    page = await real.fleet.workers[number].metrics()
    found = re.findall(r'^inferq_attempts_total\{.*outcome="done".*\} ([\d.e+]+)$', page, re.MULTILINE)
    return sum(round(float(value)) for value in found)
