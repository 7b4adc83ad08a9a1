"""Workers are lost under load: nobody's request fails, nobody gets another's answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from manager.settings import ManagerSettings
from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet
from tests.support.load import DIMENSIONS, Load
from tests.support.queue import live_counts
from tests.support.servers import Server
from tests.support.sse import read_data
from tests.support.waiting import eventually
from worker.engines.simulated import chat_prompt, prompt_digest
from worker.engines.simulated.api.answers import WORDS
from worker.engines.simulated.api.requests import DIGEST_CHARS
from worker.engines.simulated.tokens import count_tokens

TALE = "a tale of some sixty letters, told in fifteen tokens, number "
TENANTS = ("acme", "globex", "initech")


async def requeued(fleet: Fleet) -> int:
    """How many attempts were lost or handed back so far."""
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith((b":requeued", b":lost")))


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
        assert live_counts(own_valkey.ask("HGETALL", ShardKeys(0).counters)) == {}
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
        async for data in read_data(answer):
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


async def test_streams_of_an_engine_that_never_says_the_same_go_on(fleet: Fleet) -> None:
    """Two workers are killed one after the other under 24 streams, chats and completions. Running again and comparing
    would break each of them; going on breaks none: every word stands in its place, roles, ids, ends and usage are those
    of one answer."""
    await fleet.up(
        workers=3, sim_mode="text", sim_nondeterministic=True, sim_answer_tokens=60, sim_tokens_per_s=30, slots=8
    )
    streams = [asyncio.create_task(_told(fleet, number)) for number in range(24)]
    for victim in fleet.workers[:2]:
        await eventually(partial(_busy, victim), "the victim runs jobs", every_s=0.01)
        await asyncio.sleep(0.5)  # in the middle of its streams, wherever that is
        victim.process.kill()
    async with asyncio.timeout(50):
        await asyncio.gather(*streams)
    metrics = await fleet.router.metrics()
    assert 'inferq_streams_interrupted_total{outcome="continued"}' in metrics
    assert 'how="compared"' not in metrics
    assert 'how="broken"' not in metrics


async def _told(fleet: Fleet, number: int) -> None:
    """One stream of an engine that draws its words anew for each request, checked word by word."""
    asked = f"tell me tale {number}"
    options = {"model": "sim", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 60}
    chat = number % 2 == 0
    if chat:
        path, body = "chat/completions", options | {"messages": [{"role": "user", "content": asked}]}
        prompt = chat_prompt([("user", asked)])
    else:
        path, body, prompt = "completions", options | {"prompt": asked}, asked
    async with fleet.session.post(f"{fleet.router.url}/v1/{path}", json=body) as answer:
        *chunks, end = [data async for data in read_data(answer)]
    assert end == "[DONE]"
    seen = [json.loads(chunk) for chunk in chunks]
    assert not [chunk for chunk in seen if "error" in chunk]
    choices = [choice for chunk in seen for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" if chat else choice["text"] for choice in choices)
    assert text.startswith(prompt_digest(prompt))
    for place in range(DIGEST_CHARS // 4, len(text) // 4):
        assert WORDS.index(text[4 * place : 4 * place + 4]) // 4 == place % 64
    assert len({chunk["id"] for chunk in seen}) == 1
    assert sum("role" in choice["delta"] for choice in choices if chat) == int(chat)
    assert len([choice for choice in choices if choice["finish_reason"]]) == 1
    (usage,) = [chunk["usage"] for chunk in seen if chunk.get("usage")]
    assert usage["completion_tokens"] == len(text) / 4
    assert usage["prompt_tokens"] == count_tokens(prompt)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


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


async def test_a_killed_worker_is_missed_at_once(tmp_path: Path, own_valkey: Server) -> None:
    """With the intervals of production: the connection that it held to the Router broke, its port refuses, its ping is
    not answered. Its job starts elsewhere before a single heartbeat was missed twice, let alone its lease."""
    usual = {
        name: ManagerSettings.model_fields[name].default
        for name in ("lease_ms", "heartbeat_interval_ms", "unresponsive_after_ms")
    }
    async with Fleet(tmp_path, own_valkey, manager=usual) as fleet:
        # As many slots as requests: both workers have their share.
        await fleet.up(workers=2, sim_tokens_per_s=4, slots=3)
        victim = fleet.workers[0]
        await eventually(partial(_certainly_missed, fleet, 2), "both are known at their URLs and hold connections")
        text = "one two three four five six seven eight nine ten eleven twelve"
        body = {"model": "sim", "messages": [{"role": "user", "content": text}]}
        asked = [asyncio.create_task(_chat(fleet, body)) for _ in range(6)]
        await eventually(partial(_busy, victim), "it runs some")
        victim.process.kill()
        begin = time.monotonic()
        await eventually(partial(requeued, fleet), "its jobs wait again", limit_s=15, every_s=0.01)
        assert time.monotonic() - begin < 2 * usual["heartbeat_interval_ms"] / 1000
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}


async def _certainly_missed(fleet: Fleet, workers: int) -> bool:
    """Whether the death of each of so many workers would be certain at once."""
    known = (await fleet.router.page("/fabric/v1/workers"))["workers"]
    # A worker is present at the Router or at the Manager: whichever was ready first when it joined.
    pages = await fleet.router.metrics() + await fleet.manager.metrics()
    present = sum(float(count) for count in re.findall(r"^inferq_session_connections ([\d.]+)$", pages, re.MULTILINE))
    return present == workers and sum(worker["url_verified"] for worker in known) == workers


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
    totals = {name: int(n) for name, n in fleet.server.ask("HGETALL", ShardKeys(0).counters).items()}
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


async def test_poison_does_not_drag_its_neighbours_along(fleet: Fleet) -> None:
    """A request that kills whichever engine runs it, among 20 that run beside it, plain and streamed: each of them is
    answered, the poison is a dead letter after its three attempts, and both workers serve on."""
    await fleet.up(workers=2, engine="sim-process", slots=16, sim_tokens_per_s=20, sim_ttft_ms=50)
    neighbours = [
        asyncio.create_task(_chat(fleet, {"model": "sim", "messages": [{"role": "user", "content": TALE + str(n)}]}))
        for n in range(10)
    ]
    streams = [asyncio.create_task(_streamed(fleet, TALE + str(n))) for n in range(10, 20)]
    await eventually(partial(_busy, fleet.workers[0]), "neighbours run")
    await eventually(partial(_busy, fleet.workers[1]), "neighbours run")
    poison = {"model": "sim", "messages": [{"role": "user", "content": "x"}], "sim": {"fail": "crash"}}
    status, answer = await _chat(fleet, poison)
    assert (status, answer["error"]["code"]) == (502, "attempts_exhausted")
    async with asyncio.timeout(60):
        for number, (status, answer) in enumerate(await asyncio.gather(*neighbours)):
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == TALE + str(number)
        assert await asyncio.gather(*streams) == [TALE + str(n) for n in range(10, 20)]
    ((_, letter),) = fleet.server.ask("XRANGE", ShardKeys(0).dead, "-", "+")
    assert letter[b"attempts"] == b"3"
    assert (await fleet.router.page("/fabric/v1/dead"))["letters"][0]["attempts"] == 3


async def _streamed(fleet: Fleet, text: str) -> str:
    """What a stream says that echoes ``text``."""
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        *chunks, end = [json.loads(data) if data != "[DONE]" else data async for data in read_data(answer)]
    assert end == "[DONE]", chunks[-1]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


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
