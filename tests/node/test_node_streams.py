"""Streams and errors as the ``openai`` package for Node reads them (``make test-node``)."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from queue_schemas import Job, MarkerKind
from tests.node.test_node_sdk import HERE, _run
from tests.unit.router.fakes import FakeQueue, PersistedStream
from tests.unit.router.served import Served, served

pytestmark = pytest.mark.node

CHUNK = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
OLD_SHAPE = b'{"object":"error","message":"the prompt is too long","type":"BadRequestError","param":null,"code":400}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed."""
    where = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "streams.mjs"):
        shutil.copy(HERE / name, where)
    asyncio.run(_run("npm", "ci", "--no-audit", "--no-fund", folder=where, limit_s=90))
    return where


async def _ask(of: Served, folder: Path, kind: str) -> dict[str, Any]:
    text = await _run(
        "node", "streams.mjs", kind, folder=folder, limit_s=30, OPENAI_BASE_URL=f"{of.url}/v1", OPENAI_API_KEY="any"
    )
    seen: dict[str, Any] = json.loads(text)
    return seen


async def _alive(of: Served, queue: FakeQueue) -> Job:
    """The next job, once its stream was sent a sign of life."""
    async with asyncio.timeout(20):
        job = await queue.enqueued.get()
    await asyncio.sleep(0.3)
    return job


async def test_a_resumable_stream_with_keepalives_is_whole(folder: Path) -> None:
    """[C1] Events with ids, comments of ours and of the engine: Node reads the text to its end."""
    queue = FakeQueue("m")
    async with served(queue, keepalive_interval_ms=50, resumable_streams=True) as running:
        asking = asyncio.ensure_future(_ask(running, folder, "chat"))
        async with asyncio.timeout(20):
            stream = PersistedStream(queue, await queue.enqueued.get())
        await asyncio.sleep(0.3)
        stream.say(CHUNK, b": the engine says hello\n\n", b"retry: 9\n\n", b"event: tick\n\n")
        await asyncio.sleep(0.3)
        stream.say(CHUNK, b"data: [DONE]\n\n", end=True)
        assert await asking == {"text": "aa", "events": 2, "error": None}


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_a_stream_that_breaks_is_an_error(folder: Path, kind: str) -> None:
    """[C2] Node throws its own error with message and code."""
    queue = FakeQueue("m")
    async with served(queue, keepalive_interval_ms=50) as running:
        asking = asyncio.ensure_future(_ask(running, folder, kind))
        job = await _alive(running, queue)
        queue.stream(job, CHUNK, end=False)
        queue.mark(job, MarkerKind.CANCELLED, reason="somebody said so")
        error = (await asking)["error"]
    assert (error[0], error[3]) == (True, "cancelled")
    assert "somebody said so" in error[2]


@pytest.mark.parametrize(("kind", "alive"), [("plain", False), ("chat", False), ("chat", True), ("responses", True)])
async def test_an_engines_older_refusal_shows_its_words(folder: Path, kind: str, alive: bool) -> None:
    """[C4] Before a stream and after signs of life, where Node showed no message or no error at all."""
    queue = FakeQueue("m")
    async with served(queue, keepalive_interval_ms=50 if alive else 60_000) as running:
        asking = asyncio.ensure_future(_ask(running, folder, kind))
        job = await _alive(running, queue)
        queue.answer(job, OLD_SHAPE, status=400)
        error = (await asking)["error"]
    assert error[0]
    assert "the prompt is too long" in error[2]
