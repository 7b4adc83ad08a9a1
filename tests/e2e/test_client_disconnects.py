"""Clients leave and deadlines pass: the engine's slots are free within one renewal, and nothing is left behind."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from queue_schemas.keys import ShardKeys
from telemetry.environment import free_port
from tests.support.fleet import ROOT, Fleet
from tests.support.processes import Child
from tests.support.queue import live_counts
from tests.support.servers import Server
from tests.support.waiting import eventually

RENEWAL_S = 5.0
"""A third of a worker's lease as it is by default, which these fleets have."""
KEYS = ShardKeys(0)
HANGS = {"fail": "hang"}
SAYS_SOMETHING = {"fail": "hang", "after_tokens": 3}
CROWD = 1_000
SLOTS = 4


class Scene(Fleet):
    """A fleet whose only worker sits before an engine of its own process, which counts what it runs."""

    engine: Child
    engine_url: str

    async def begin(self, slots: int) -> None:
        port = free_port()
        self.engine_url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "worker.engines.simulated", "--mode", "echo", "--port", str(port)]
        self.engine = Child("engine", command, self.folder / "engine.log", cwd=ROOT)
        self.engine.start()
        await self.up(engine="url", engine_url=self.engine_url, slots=slots)

    def ask(self, how: dict[str, Any], *, stream: bool, **fields: Any) -> Any:
        """A request that ends only with its client or its time."""
        body = {"model": "sim", "messages": [{"role": "user", "content": "one two three four five six"}]}
        body |= {"stream": stream, "sim": how} | fields
        return self.session.post(f"{self.router.url}/v1/chat/completions", json=body)

    async def metric(self, name: str) -> float:
        """A metric of the engine."""
        async with self.session.get(f"{self.engine_url}/metrics") as answer:
            page = await answer.text()
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    async def engine_runs(self, count: int) -> bool:
        return await self.metric("vllm:num_requests_running") == count

    async def waits_and_runs(self, waiting: int, running: int) -> bool:
        depth = await self.depth()
        return (depth["waiting"], depth["leased"]) == (waiting, running)

    async def stopped(self) -> dict[str, int]:
        """What was stopped, as a Manager's metrics say it."""
        page = await self.manager.metrics()
        found = re.findall(r'inferq_jobs_stopped_total{cause="(\w+)".*state="(\w+)"} (\S+)', page)
        return {f"{state}/{cause}": int(float(count)) for cause, state, count in found}

    async def left_behind(self) -> dict[str, Any]:
        """What of jobs is still in Redis, beside counters and tombstones."""
        ask = self.server.ask
        live = {str(key): ask("TYPE", key) for kind in ("q", "retry", "leases") for key in ask("KEYS", f"*:{kind}:*")}
        counts = {"budget": ask("HGETALL", KEYS.budget), "counters": live_counts(ask("HGETALL", KEYS.counters))}
        return {name: held for name, held in (live | counts | {"late": ask("ZCARD", KEYS.deadlines)}).items() if held}

    async def nothing_left_behind(self) -> bool:
        return await self.left_behind() == {}


@pytest.fixture
async def scene(tmp_path: Path, own_valkey: Server) -> AsyncIterator[Scene]:
    async with Scene(tmp_path, own_valkey, manager={"lease_ms": 15_000}) as scene:
        try:
            yield scene
        finally:
            scene.engine.kill()


async def _leave(asking: asyncio.Task[Any]) -> None:
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def _read(request: Any) -> bytes:
    async with request as answer:
        return bytes(await answer.read())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_let_go_of_wherever_its_request_is(scene: Scene, stream: bool) -> None:
    """Running without a byte said, in the middle of its answer, or waiting: the engine's slot is free within one
    renewal, and what nobody has claimed is never run."""
    await scene.begin(slots=1)
    for how in (HANGS, SAYS_SOMETHING):
        asking = asyncio.create_task(_read(scene.ask(how, stream=stream)))
        await eventually(lambda: scene.engine_runs(1), "the engine runs it")
        await _leave(asking)
        await eventually(lambda: scene.engine_runs(0), "the engine is idle", limit_s=RENEWAL_S)
    if stream:
        async with scene.ask(SAYS_SOMETHING, stream=True) as answer:
            await answer.content.readuntil(b"\n\n")
        await eventually(lambda: scene.engine_runs(0), "the engine is idle", limit_s=RENEWAL_S)
    runs = asyncio.create_task(_read(scene.ask(HANGS, stream=stream)))
    await eventually(lambda: scene.engine_runs(1), "the only slot is taken")
    started = await scene.metric("vllm:prompt_tokens_total")
    waits = asyncio.create_task(_read(scene.ask(HANGS, stream=stream)))
    await eventually(lambda: scene.waits_and_runs(1, 1), "another one waits")
    assert await scene.left_behind() != {}
    await _leave(waits)
    await eventually(lambda: scene.waits_and_runs(0, 1), "it waits no more")
    await _leave(runs)
    await eventually(lambda: scene.engine_runs(0), "the engine is idle", limit_s=RENEWAL_S)
    await eventually(scene.nothing_left_behind, "nothing is left")
    assert await scene.metric("vllm:prompt_tokens_total") == started, "the one that waited was run"
    assert await scene.stopped() == {"cancelled/running": 3 + stream, "cancelled/waiting": 1}


async def test_a_thousand_clients_that_leave_at_once_leave_nothing_behind(scene: Scene) -> None:
    """Their jobs, leases, budgets and engine calls are gone soon, each is counted, and the next client is answered."""
    await scene.begin(slots=SLOTS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as crowd:
        mine, scene.session = scene.session, crowd
        asking = [asyncio.create_task(_read(scene.ask(SAYS_SOMETHING, stream=n % 2 == 0))) for n in range(CROWD)]
        scene.session = mine
        await eventually(lambda: scene.waits_and_runs(CROWD - SLOTS, SLOTS), "all are in the queue", limit_s=40)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    await eventually(scene.nothing_left_behind, "nothing is left", limit_s=4 * RENEWAL_S)
    await eventually(lambda: scene.engine_runs(0), "the engine is idle", limit_s=RENEWAL_S)
    stopped = await scene.stopped()
    assert sum(stopped.values()) == CROWD
    assert stopped["cancelled/running"] >= SLOTS
    assert f'inferq_jobs_cancelled_total{{reason="client_left"}} {CROWD}.0' in await scene.router.metrics()
    assert "inferq_open_requests 0.0" in await scene.router.metrics()
    async with scene.ask({}, stream=False) as answer:
        assert answer.status == 200


async def test_a_deadline_holds_in_the_queue_and_at_the_engine(scene: Scene) -> None:
    """What is not begun in time is never begun, what runs is aborted at the engine; each client gets its 504."""
    await scene.begin(slots=1)
    holds = asyncio.create_task(_read(scene.ask(HANGS, stream=False)))
    await eventually(lambda: scene.engine_runs(1), "the only slot is taken")
    started = await scene.metric("vllm:prompt_tokens_total")
    assert await _status(scene.ask({}, stream=False, timeout=0.5)) == (504, "deadline_exceeded")
    await _leave(holds)
    await eventually(lambda: scene.engine_runs(0), "the engine is idle", limit_s=RENEWAL_S)
    await eventually(scene.nothing_left_behind, "nothing is left")
    assert await scene.metric("vllm:prompt_tokens_total") == started, "it was begun after its deadline"
    assert await _status(scene.ask(HANGS, stream=False, timeout=2.5)) == (504, "deadline_exceeded")
    await eventually(lambda: scene.engine_runs(0), "the engine is idle again", limit_s=RENEWAL_S)
    assert await scene.metric("vllm:prompt_tokens_total") == 2 * started, "it was not begun"
    assert await scene.stopped() == {"cancelled/running": 1, "expired/running": 1, "expired/waiting": 1}


async def _status(request: Any) -> tuple[int, str]:
    async with request as answer:
        return answer.status, (await answer.json())["error"]["code"]
