"""A worker's engine on a server that stands in for one, and what it answers there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from queue_schemas import EngineState, Job
from tests.support.queue import make_job
from tests.support.waiting import eventually
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import Dialect, EngineCall
from worker.engines.http import HttpEngine

from .fake import ANSWER, FakeEngine, events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS)


@asynccontextmanager
async def engine_at(url: str, dialect: Dialect | None = None) -> AsyncIterator[HttpEngine]:
    """The engine at ``url``, once it is ready."""
    engine = HttpEngine(url, dialect=dialect)
    running = asyncio.create_task(engine.run(lambda: None))
    try:
        await eventually(lambda: engine.state is EngineState.READY, f"the engine at {url} is ready", limit_s=20)
        yield engine
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.stop(1)


@asynccontextmanager
async def attached(fake: FakeEngine, dialect: Dialect | None = None) -> AsyncIterator[HttpEngine]:
    """The engine that ``fake`` is."""
    async with fake.serving(), engine_at(fake.url, dialect) as engine:
        yield engine


def stream_of(model: str, path: str = CHAT, prefix: str = "", **fields: Any) -> Job:
    """A stream with its usage."""
    asked = {"messages": [{"role": "user", "content": "Tell me."}]} if path == CHAT else {"prompt": "Tell me: "}
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **asked, **fields}
    return make_job(model=model, path=path, body=json.dumps(body).encode(), stream=True, prefix=prefix)


async def answer_of(engine: HttpEngine, job: Job, body: bytes | None = None) -> bytes:
    """All that the engine answers."""
    async with engine.call(EngineCall(job.path, body or job.body)) as answer:
        assert answer.status == 200
        return await answer.read(1 << 20)


async def rest_of(engine: HttpEngine, job: Job) -> bytes:
    """What a worker passes on of a continued attempt."""
    plan = await plan_continuation(engine, job)
    if plan.body is None:
        return plan.ending(7)
    return plan.feed(await answer_of(engine, job, plan.body)) + plan.end()


def said(stream: bytes) -> tuple[str, str, dict[str, int]]:
    """Text, finish reason and usage of a stream."""
    assert stream.endswith(b"data: [DONE]\n\n")
    text, finish, usage = "", "", {}
    for chunk in events_of(stream):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            finish = choice["finish_reason"] or finish
    return text, finish, {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


async def check_every_cut(engine: HttpEngine, path: str, cuts: range = range(4, len(ANSWER), 24)) -> None:
    """Text, finish reason and usage of two parts are those of the uninterrupted answer, wherever it is cut."""
    (model, *_) = engine.models
    whole, finish, usage = said(await answer_of(engine, stream_of(model, path, max_tokens=150)))
    for cut in cuts:
        rest = said(await rest_of(engine, stream_of(model, path, whole[:cut], max_tokens=150)))
        assert (whole[:cut] + rest[0], *rest[1:]) == (whole, finish, usage), cut
