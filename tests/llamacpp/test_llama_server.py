"""llama.cpp's own server behind its dialect: nothing in ``tests/fixtures`` stands in for it here."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from queue_schemas import CONTINUED, EngineState
from tests.integration.worker.fleet import Answer, Client, LocalFleet
from tests.support.engines.attached import (
    CHAT,
    COMPLETIONS,
    PATHS,
    answer_of,
    engine_at,
    rest_of,
    said,
    stream_of,
)
from tests.support.engines.fake import events_of
from tests.support.waiting import eventually
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import EngineCall
from worker.engines.adapter_calls import AdaptersUnsupported
from worker.engines.http import HttpEngine

from .conftest import MODEL, SLOTS, llama_server, until_ready
from .environment import LlamacppEnvironment

pytestmark = [pytest.mark.llamacpp, pytest.mark.timeout(3600)]

MAX_TOKENS = 48
LONG = {"max_tokens": 1_500, "ignore_eos": True, "temperature": 0}


async def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the server answers when it is asked directly."""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def test_it_becomes_ready_when_its_model_is_loaded(llamacpp: LlamacppEnvironment, tmp_path: Path) -> None:
    """It is known by its own list; until then it says that it loads."""
    with llama_server(llamacpp, tmp_path, "--metrics") as url:
        async with engine_at(url) as engine:
            assert (engine.dialect.name, engine.models) == ("llamacpp", (MODEL,))
            assert engine.cards[MODEL]["owned_by"] == "llamacpp"
    gone = HttpEngine(url)
    running = asyncio.create_task(gone.run(lambda: None))
    await eventually(lambda: gone.state is EngineState.FAILED, "it is seen to be away")
    running.cancel()


@pytest.mark.parametrize("path", PATHS)
async def test_a_cut_stream_goes_on_as_the_server_does_behind_the_same_text(server_url: str, path: str) -> None:
    """Nothing is repeated: the rest is what it says behind the raw prompt, and the usage is that of one answer."""
    asked = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    async with engine_at(server_url) as engine:
        whole, finish, usage = said(await answer_of(engine, stream_of(MODEL, path, **asked)))
        assert (finish, usage["completion_tokens"]) == ("length", MAX_TOKENS)
        job = stream_of(MODEL, path, **asked)
        fields = json.loads(job.body)
        raw = (await post(server_url, "/apply-template", fields))["prompt"] if path == CHAT else fields["prompt"]
        for cut in (1, 20, len(whole) // 2, len(whole) * 3 // 4):
            begun = whole[:cut]
            rest, end, counted = said(await rest_of(engine, stream_of(MODEL, path, begun, **asked)))
            tokens = [
                len((await post(server_url, "/tokenize", {"content": text, "add_special": True}))["tokens"])
                for text in (raw, raw + begun)
            ]
            left = MAX_TOKENS - (tokens[1] - tokens[0])
            direct = await post(
                server_url, "/completion",
                {"prompt": raw + begun, "n_predict": left, "temperature": 0, "ignore_eos": True},
            )  # fmt: skip
            assert (rest, end) == (direct["content"], "length"), cut
            assert counted == usage, cut


async def test_a_prefix_that_ends_in_white_space_is_kept(server_url: str) -> None:
    """The chat template does not cut it off."""
    async with engine_at(server_url) as engine:
        plan = await plan_continuation(engine, stream_of(MODEL, CHAT, "Three colours are \n\n", max_tokens=9))
        assert plan.said_tokens > 0


async def test_a_completion_without_a_limit_has_none_behind_its_prefix_either(server_url: str) -> None:
    """Unlike vLLM's sixteen tokens."""
    async with engine_at(server_url) as engine:
        plan = await plan_continuation(engine, stream_of(MODEL, COMPLETIONS, "Once upon"))
        assert plan.body is not None
        assert "max_tokens" not in json.loads(plan.body)


async def test_its_metrics_tell_load_and_progress_and_a_closed_connection_aborts(server_url: str) -> None:
    """Three streams on two slots: one is deferred. When they are left, nothing runs."""
    async with engine_at(server_url) as engine:
        assert await engine.load() is not None
        body = stream_of(MODEL, CHAT, **LONG).body

        async def stream() -> None:
            async with engine.call(EngineCall(CHAT, body)) as answer:
                async for _ in answer.chunks():
                    pass

        streams = [asyncio.create_task(stream()) for _ in range(SLOTS + 1)]

        async def is_full() -> bool:
            load = await engine.load()
            return load is not None and (load.running, load.waiting) == (SLOTS, 1)

        await eventually(is_full, "two run and one is deferred", limit_s=20)
        before = await engine.progress()
        await asyncio.sleep(0.3)
        assert await engine.progress() != before
        for one in streams:
            one.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

        async def is_idle() -> bool:
            load = await engine.load()
            return load is not None and (load.running, load.waiting) == (0, 0)

        await eventually(is_idle, "all of them are aborted", limit_s=10)
        idle = await engine.progress()
        await asyncio.sleep(0.3)
        assert await engine.progress() == idle


async def test_a_request_that_is_no_stream_is_aborted_too(server_url: str) -> None:
    """Before it has answered anything, once the server has had no result for anybody within a second: so it is looked
    at more rarely here."""
    async with engine_at(server_url) as engine:
        body = json.dumps({"model": MODEL, "prompt": "Tell me: ", **LONG}).encode()

        async def ask() -> None:
            async with engine.call(EngineCall(COMPLETIONS, body)):
                pass

        asking = asyncio.create_task(ask())

        async def running() -> int:
            load = await engine.load()
            return -1 if load is None or load.running is None else load.running

        await eventually(lambda: _is(running, 1), "it runs")
        asking.cancel()
        await eventually(lambda: _is(running, 0), "it is aborted", limit_s=5, every_s=1.5)


async def _is(figure: Any, wanted: int) -> bool:
    return bool(await figure() == wanted)


async def test_without_metrics_it_tells_no_load(llamacpp: LlamacppEnvironment, tmp_path: Path) -> None:
    """501; its answers prove progress."""
    with llama_server(llamacpp, tmp_path) as url:
        async with engine_at(url) as engine:
            assert await engine.load() is None
            assert await engine.progress() != await engine.progress()
            with pytest.raises(AdaptersUnsupported):
                await engine.load_adapter("tuned", "/tuned")


def text_of(answer: Answer) -> str:
    """What a stream said."""
    assert answer.status == 200
    assert answer.body.endswith(b"data: [DONE]\n\n")
    return "".join(
        choice["delta"].get("content") or "" for chunk in events_of(answer.body) for choice in chunk["choices"]
    )


async def test_a_worker_serves_it(fleet_and_client: tuple[LocalFleet, Client], server_url: str) -> None:
    """A chat, plain and streamed; a stream that goes on; slots that follow."""
    fleet, client = fleet_and_client
    await until_ready(fleet, client, server_url, "--slots", "8", "--engine-load-interval-ms", "100")
    plain = await client.ask(model=MODEL, max_tokens=16)
    assert json.loads(plain.body)["usage"]["completion_tokens"] == 16
    assert text_of(await client.ask(model=MODEL, stream=True, max_tokens=16))
    answer = await client.ask(model=MODEL, stream=True, max_tokens=24, prefix="Three colours are ")
    assert answer.frames[0].flags & CONTINUED
    assert not text_of(answer).startswith("Three colours")
    jobs = [await client.send(model=MODEL, stream=True, max_tokens=100) for _ in range(24)]
    (worker,) = fleet._workers
    await eventually(lambda: worker.worker.status().slots <= SLOTS + 2, "the slots follow", limit_s=30)
    for job in jobs:
        assert text_of(await client.answer(job, limit_s=120))
