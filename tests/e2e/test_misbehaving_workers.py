"""Workers that are not what they seem: an engine that never gets ready, a URL that is somebody else's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually


@pytest.fixture
async def starting_engine() -> AsyncIterator[str]:
    """The URL of a server that says 503 of its health for ever, though it lists a model."""

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "loading"}, status=503)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "late", "object": "model"}]})

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("/"))


@pytest.mark.parametrize("kind", ["sim-process", "url"])
async def test_requests_wait_while_an_engine_never_gets_ready(
    tmp_path: Path, own_valkey: Server, starting_engine: str, kind: str
) -> None:
    """The worker says why it is not ready, the pool counts no worker and its queue grows; another worker, whose engine
    is ready, answers what waited."""
    flags = {"sim_never_ready": True} if kind == "sim-process" else {"engine_url": starting_engine}
    async with Fleet(tmp_path, own_valkey, router={"pools": "late"}) as fleet:
        for role in (fleet.manager, fleet.router):
            await role.start()
        unready = fleet.worker("unready", engine=kind, model="late", **flags)
        unready.process.start()

        async def joined() -> dict[str, Any] | None:
            workers = (await fleet.router.page("/fabric/v1/workers"))["workers"]
            return next((worker for worker in workers if worker["worker_id"] == "unready"), None)

        await eventually(joined, "the worker has joined", limit_s=20)
        await eventually(lambda: _says_why(unready), "it says why it is not ready")
        answers = [asyncio.create_task(_chat(fleet, "late", f"number {number}")) for number in range(5)]

        async def queued() -> bool:
            return bool((await fleet.depth("late"))["waiting"] == 5)

        await eventually(queued, "five requests wait")
        depth, worker = await fleet.depth("late"), await joined()
        assert (depth["workers"], depth["outstanding"]) == (0, 5)
        assert worker is not None and worker["engine"] != "ready" and worker["engine_detail"]
        assert not any(answer.done() for answer in answers)
        await fleet.worker("able", model="late").start()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*answers) == [(200, f"number {number}") for number in range(5)]
        assert (await unready.get("/readyz"))[0] == 503
        await fleet.until_served(1, "late")


async def _says_why(worker: Role) -> bool:
    status, body = await worker.get("/readyz")
    return status == 503 and any(reason.startswith("the engine is ") for reason in json.loads(body)["reasons"])


async def test_a_worker_whose_url_is_anothers_works_and_outlives_it(fleet: Fleet) -> None:
    """The Manager notes whom the URL belongs to, and the other's death, which its URL tells, is not taken for this
    worker's: its running job is not lost."""
    await fleet.up(workers=1)
    other = fleet.workers[0]
    fleet.worker("misplaced", model="slow", advertise_url=other.url, sim_tokens_per_s=4)
    await fleet.workers[1].start()
    await fleet.until_served(1, "slow")

    async def listed() -> dict[str, dict[str, Any]]:
        workers = (await fleet.router.page("/fabric/v1/workers"))["workers"]
        return {worker["worker_id"]: worker for worker in workers}

    async def noted() -> bool:
        return "worker 'worker-1'" in (await listed())["misplaced"]["url_note"]

    await eventually(noted, "the note names the other worker")
    before = await listed()
    assert before["worker-1"]["url_note"] == ""
    # Longer than a lease, so that whatever is wrongly concluded from the silent port has time to be.
    text = " ".join(f"word{number}" for number in range(24))
    asked = asyncio.create_task(_chat(fleet, "slow", text))

    async def running() -> bool:
        return bool((await fleet.workers[1].page("/status"))["running"])

    await eventually(running, "it runs the job")
    other.process.kill()
    await eventually(lambda: _buried(fleet) == {"worker-1"}, "worker-1 is declared dead", limit_s=10)
    assert not asked.done()
    async with asyncio.timeout(30):
        assert await asked == (200, text)
    assert _buried(fleet) == {"worker-1"}
    now = (await listed())["misplaced"]
    assert (now["session_id"], now["state"]) == (before["misplaced"]["session_id"], "active")
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    assert [name for name in totals if name.startswith(b"slow:") and name.endswith(b":requeued")] == []
    assert (await _chat(fleet, "slow", "one more")) == (200, "one more")


def _buried(fleet: Fleet) -> set[str]:
    """The workers that the Manager has declared dead."""
    lines = [json.loads(line) for line in fleet.manager.process.log_text().splitlines()]
    return {line["worker"] for line in lines if line.get("event") == "session_declared_dead"}


async def _chat(fleet: Fleet, model: str, text: str) -> tuple[int, str]:
    """Status and text of an answer."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        said = await answer.json()
        return answer.status, said["choices"][0]["message"]["content"] if answer.status == 200 else str(said)
