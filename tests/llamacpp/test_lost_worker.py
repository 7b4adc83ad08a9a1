"""A fleet beside llama.cpp's own server: a stream whose worker is killed goes on without a gap or a repetition."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.sse import read_data
from tests.support.waiting import eventually

from .conftest import MODEL, llama_server
from .environment import LlamacppEnvironment

pytestmark = [pytest.mark.llamacpp, pytest.mark.timeout(3600)]

MAX_TOKENS = 400
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me about the city of Paris."}],
    "max_tokens": MAX_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}


async def _direct(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def _runner(fleet: Fleet) -> Role:
    async def found() -> Role | None:
        for worker in fleet.workers:
            status, page = await worker.get("/status")
            if status == 200 and json.loads(page)["running"]:
                return worker
        return None

    runner = await eventually(found, "a worker runs it", limit_s=30)
    assert isinstance(runner, Role)
    return runner


async def test_a_stream_whose_worker_is_killed_goes_on_at_another_server(
    llamacpp: LlamacppEnvironment, own_valkey: Server, tmp_path: Path
) -> None:
    """The client sees one answer, of which the rest is what the other server says behind the same text."""
    with ExitStack() as servers:
        urls = []
        for number in range(2):
            folder = tmp_path / f"server-{number}"
            folder.mkdir()
            urls.append(servers.enter_context(llama_server(llamacpp, folder, "--metrics")))
        async with Fleet(tmp_path, own_valkey) as fleet:
            for number, url in enumerate(urls):
                fleet.worker(f"worker-{number + 1}", engine="url", engine_url=url, model="")
            for role in (fleet.manager, fleet.router, *fleet.workers):
                role.process.start()
            await asyncio.gather(*(role.ready() for role in (fleet.manager, fleet.router, *fleet.workers)))
            await fleet.until_served(2, MODEL)
            text, usage, finishes = "", {}, []

            async def stream() -> None:
                nonlocal text, usage
                body = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
                async with fleet.session.post(fleet.router.url + "/v1/chat/completions", json=body) as answer:
                    assert answer.status == 200
                    async for data in read_data(answer):
                        if data == "[DONE]":
                            return
                        chunk = json.loads(data)
                        assert "error" not in chunk, chunk
                        usage = chunk.get("usage") or usage
                        for choice in chunk["choices"]:
                            text += choice["delta"].get("content") or ""
                            finishes.extend([choice["finish_reason"]] if choice.get("finish_reason") else [])

            streaming = asyncio.create_task(stream())
            await eventually(lambda: len(text) > 60, "some of it has come", limit_s=60, every_s=0.005)
            victim = await _runner(fleet)
            victim.process.kill_group()
            async with asyncio.timeout(60):
                await streaming
            events = [json.loads(line) for line in fleet.router.process.log_text().splitlines() if line[:1] == "{"]
            at = [event["delivered"] for event in events if event.get("event") == "stream_resumed"][-1]
            assert 60 <= at < len(text)
            begun = text[:at]
            other = urls[1 - fleet.workers.index(victim)]
            raw = (await _direct(other, "/apply-template", ASKED))["prompt"]
            said = [len((await _direct(other, "/tokenize", {"content": one}))["tokens"]) for one in (raw, raw + begun)]
            body = {"prompt": raw + begun, "n_predict": MAX_TOKENS - said[1] + said[0]}
            direct = await _direct(other, "/completion", body | {"temperature": 0, "ignore_eos": True})
            assert text == begun + direct["content"]
            assert finishes == ["length"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (said[0], MAX_TOKENS)
