"""The workers of ``examples/workers``, each under load beside a simulated engine that knows nothing of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from queue_schemas.keys import ShardKeys
from tests.support.example_worker import ExampleWorker, example_command
from tests.support.fleet import Fleet
from tests.support.load import DIMENSIONS, Load
from tests.support.sse import read_data
from tests.support.waiting import eventually

LANGUAGES = ("python", "node", "go")
MODELS = ("sim", "tuned")
KEY = "a-key-of-a-worker"
REQUESTS = 160
STREAMS = 3
WORDS = 60
LIMIT_S = 25


@asynccontextmanager
async def examples(
    fleet: Fleet, language: str, *, workers: int, tokens_per_s: int
) -> AsyncIterator[list[ExampleWorker]]:
    """So many workers, with an engine each, behind a Router that asks for their key."""
    credentials = fleet.folder / "credentials.toml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    credentials.write_text(f'[edge]\nsha256 = ["{digest}"]\nmodels = ["sim", "tuned"]\nworkers = {workers}\n')
    router = fleet.another_router("router-of-workers", worker_credentials_file=credentials)
    fleet.router = router
    command = example_command(language, fleet.folder)
    found = [_example(fleet, command, number, tokens_per_s) for number in range(workers)]
    try:
        for example in found:
            example.engine.start()
            example.process.start()
        await asyncio.gather(fleet.manager.start(), router.start())
        await fleet.until_served(workers)
        yield found
    except BaseException:
        for example in found:
            print(example.process.log_tail())
        raise
    finally:
        for example in found:
            example.kill()


def _example(fleet: Fleet, command: Sequence[str], number: int, tokens_per_s: int) -> ExampleWorker:
    port = fleet.ports.take()
    options = ["--model", "sim", "--model", "tuned", "--mode", "echo", "--ttft-ms", 5, "--port", port]
    options += ["--tokens-per-s", tokens_per_s, "--embedding-dimensions", DIMENSIONS]
    env = {
        "ROUTER_URL": fleet.router.url,
        "ENGINE_URL": f"http://127.0.0.1:{port}",
        "WORKER_KEY": KEY,
        "WORKER_ID": f"edge.{number}",
        "WORKER_SLOTS": "8",
    }
    return ExampleWorker(fleet.folder, f"edge.{number}", command, options, env)


def _held(fleet: Fleet, example: ExampleWorker) -> int:
    """How many jobs it has."""
    keys = fleet.server.ask("KEYS", f"*leases:{example.name}.*")
    return sum(int(fleet.server.ask("HLEN", key)) for key in keys)


def _requeued(fleet: Fleet) -> int:
    """How many attempts were lost or handed back so far."""
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith((b":requeued", b":lost")))


@pytest.mark.parametrize("language", LANGUAGES)
async def test_no_request_fails_when_an_example_worker_is_killed(fleet: Fleet, language: str) -> None:
    """Chats, completions and embeddings, plain and streamed, on two workers, of which one is killed with running jobs:
    every answer is whole and its own."""
    async with examples(fleet, language, workers=2, tokens_per_s=200) as (victim, _):
        load = Load(fleet.router.url, REQUESTS, 24, models=MODELS)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await load.reached(0.3)
            await eventually(lambda: _held(fleet, victim) > 1, "the victim runs jobs", every_s=0.002)
            victim.process.kill()
        assert load.wrong == []
        assert load.done == REQUESTS
        assert _requeued(fleet) > 0, "no job was ever lost: the test has proved nothing"


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_example_worker_ends_its_streams_before_it_exits(fleet: Fleet, language: str) -> None:
    """SIGTERM: running streams end on the worker that began them, which then exits with 0."""
    text = " ".join(f"word-{number}" for number in range(WORDS))
    begun: list[int] = []

    async def stream(number: int) -> str:
        body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True}
        said = ""
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for data in read_data(answer):
                begun.append(number)
                if data == "[DONE]":
                    return said
                said += json.loads(data)["choices"][0]["delta"].get("content") or ""
        return f"{said}, and no end"

    async with examples(fleet, language, workers=1, tokens_per_s=150) as (example,):
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            streams = [group.create_task(stream(number)) for number in range(STREAMS)]
            await eventually(lambda: len(set(begun)) == STREAMS, "all streams have begun")
            example.process.send(signal.SIGTERM)
        assert [task.result() for task in streams] == [text] * STREAMS
        await eventually(lambda: not example.process.running, "the worker ends", limit_s=10)
        assert example.process.returncode == 0
        assert _requeued(fleet) == 0
