"""Workers are lost under load: nobody's request fails, nobody gets another's answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet
from tests.support.load import DIMENSIONS, Load, events_of
from tests.support.servers import Server
from tests.support.waiting import eventually

TENANTS = ("acme", "globex", "initech")


async def requeued(fleet: Fleet) -> int:
    """How many attempts were lost or handed back so far."""
    totals = fleet.server.ask("HGETALL", ShardKeys(0).totals)
    return sum(int(count) for name, count in totals.items() if name.endswith(b":requeued"))


async def test_two_thousand_mixed_requests_survive_a_killed_and_a_drained_worker(
    tmp_path: Path, own_valkey: Server
) -> None:
    """64 clients of three tenants, two models, plain and streamed, on three workers, of which one is killed with
    running jobs and one is drained: none of 2,000 requests fails and none is mixed up."""
    lines = ",".join(f"{hashlib.sha256(tenant.encode()).hexdigest()}:{tenant}" for tenant in TENANTS)
    async with Fleet(tmp_path, own_valkey, router={"api_keys": lines}) as fleet:
        fleet.session.headers["authorization"] = "Bearer acme"
        await fleet.up(workers=3, model="sim,tuned", slots=16, sim_embedding_dimensions=DIMENSIONS)
        load = Load(fleet.router.url, 2_000, 64, models=("sim", "tuned"), keys=TENANTS)
        victim, drained, last = fleet.workers
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await load.reached(0.2)
            await eventually(lambda: _busy(victim), "the victim runs jobs", every_s=0.002)
            victim.process.kill()
            await load.reached(0.4)
            drained.process.send(signal.SIGTERM)
        assert load.wrong == []
        assert load.done == 2_000
        assert await requeued(fleet) > 0, "no job was ever lost: the test has proved nothing"
        assert await drained.ended() == 0
        assert last.process.running
        await fleet.until_served(1)
        assert own_valkey.ask("HGETALL", ShardKeys(0).depth) == {}
        assert {name: n for name, n in own_valkey.ask("HGETALL", ShardKeys(0).budget).items() if n != b"0"} == {}
        assert int(own_valkey.ask("ZCARD", ShardKeys(0).deadlines)) == 0


async def _busy(worker: Any) -> bool:
    return bool((await worker.page("/status"))["running"])


async def test_a_stream_goes_on_without_a_gap_when_its_worker_is_killed(fleet: Fleet) -> None:
    """In the middle of a stream the worker dies: the client sees one text, one id, no repeat, no error."""
    await fleet.up(workers=2, sim_tokens_per_s=25)
    text = " ".join(f"word{number}" for number in range(60))
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True}
    pieces: list[str] = []
    ids: set[str] = set()
    killed = False
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        async for data in events_of(answer):
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            assert "error" not in chunk
            ids.add(chunk["id"])
            pieces.append(chunk["choices"][0]["delta"].get("content") or "")
            if len(pieces) == 12:
                for worker in fleet.workers:
                    if not killed and await _busy(worker):
                        worker.process.kill()
                        killed = True
                assert killed
    assert "".join(pieces) == text
    assert len(ids) == 1
    assert await requeued(fleet) == 1


async def test_a_plain_request_answers_late_but_right_when_its_worker_is_killed(fleet: Fleet) -> None:
    """Its only worker is killed while it runs; one that comes later finishes it."""
    await fleet.up(workers=1, sim_tokens_per_s=4)
    body = {"model": "sim", "messages": [{"role": "user", "content": "one two three four five six seven"}]}
    asked = asyncio.create_task(_chat(fleet, body))
    await eventually(lambda: _busy(fleet.workers[0]), "the worker runs it")
    fleet.workers[0].process.kill()
    await fleet.worker("worker-late").start()
    async with asyncio.timeout(20):
        status, answer = await asked
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "one two three four five six seven")


async def test_a_hung_worker_loses_its_lease(fleet: Fleet) -> None:
    """A worker that is stopped, not dead, keeps its port open: after a whole lease its job runs elsewhere, and when it
    comes back its late answer is refused."""
    await fleet.up(workers=1, sim_tokens_per_s=4)
    body = {"model": "sim", "messages": [{"role": "user", "content": "one two three four five"}]}
    asked = asyncio.create_task(_chat(fleet, body))
    await eventually(lambda: _busy(fleet.workers[0]), "the worker runs it")
    fleet.workers[0].process.pause()
    begin = time.monotonic()
    await fleet.worker("worker-2", sim_tokens_per_s=400).start()
    async with asyncio.timeout(25):
        status, answer = await asked
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "one two three four five")
    assert time.monotonic() - begin < 20
    fleet.workers[0].process.resume()
    await fleet.until_served(2)
    totals = {name: int(n) for name, n in fleet.server.ask("HGETALL", ShardKeys(0).totals).items()}
    assert totals[b"sim:interactive:done"] == 1


async def test_jobs_that_kill_every_engine_end_with_an_error(fleet: Fleet) -> None:
    """A request that crashes whoever runs it is given up after its attempts, and the fleet serves on."""
    await fleet.up(workers=2, engine="sim-process")
    body = {"model": "sim", "messages": [{"role": "user", "content": "x"}], "sim": {"fail": "crash"}}
    status, answer = await _chat(fleet, body)
    assert status == 502
    assert answer["error"]["code"] in ("engine_failed", "attempts_exhausted")
    del body["sim"]
    status, answer = await _chat(fleet, body)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == "x"


async def test_two_workers_with_one_id_do_not_share_it(fleet: Fleet) -> None:
    """The second live worker of a name is refused with a sentence, the first one serves on."""
    await fleet.up(workers=1)
    twin = fleet.worker("worker-1")
    twin.process.log_path = fleet.folder / "twin.log"
    twin.process.start()
    await eventually(lambda: "worker_id" in twin.process.log_text(), "the twin hears of it", limit_s=20)
    status, _ = await _chat(fleet, {"model": "sim", "messages": [{"role": "user", "content": "x"}]})
    assert status == 200
    workers = (await fleet.router.page("/fabric/v1/workers"))["workers"]
    assert len(workers) == 1


async def _chat(fleet: Fleet, body: dict[str, Any]) -> tuple[int, Any]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body, timeout=timeout) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_engine(fleet: Fleet, stream: bool) -> None:
    """Closing the connection cancels the job, and the worker's slot is free again within a moment."""
    await fleet.up(workers=1, sim_tokens_per_s=2)
    # Left alone, this answer would take a minute.
    text = " ".join(f"word{number}" for number in range(60))
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": stream}
    asked = asyncio.create_task(_chat(fleet, body))
    await eventually(lambda: _busy(fleet.workers[0]), "the worker runs it")
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)

    async def idle() -> bool:
        return not await _busy(fleet.workers[0])

    await eventually(idle, "the slot is free", limit_s=4)
    totals = fleet.server.ask("HGETALL", ShardKeys(0).totals)
    assert int(totals[b"sim:interactive:cancelled"]) == 1
