"""Parts of the fabric go away and come back: what was acknowledged is answered, what cannot be done is said."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp

from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet
from tests.support.load import DIMENSIONS, Load
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": "sim", "messages": [{"role": "user", "content": text}], **fields}


async def ask(fleet: Fleet, body: dict[str, Any], url: str = "", **headers: str) -> tuple[int, Any]:
    """Status and JSON of a chat."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{url or fleet.router.url}/v1/chat/completions"
    async with fleet.session.post(url, json=body, headers=named) as answer:
        return answer.status, await answer.json()


async def ended(fleet: Fleet, state: str) -> int:
    """How many jobs ended in ``state`` so far."""
    totals = await asyncio.to_thread(fleet.server.ask, "HGETALL", ShardKeys(0).counters)
    return sum(int(n) for name, n in totals.items() if name.decode().endswith(f":{state}"))


async def test_redis_is_killed_under_load_and_comes_back(fleet: Fleet) -> None:
    """kill -9 in the middle of 400 requests, streams among them, with appendfsync everysec: clients wait a little
    longer, every answer is right."""
    await fleet.up(workers=2, sim_embedding_dimensions=DIMENSIONS)
    load = Load(fleet.router.url, 400, 32)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        for share in (0.25, 0.6):
            await load.reached(share)
            fleet.server.kill()
            # Away long enough for every call under way to fail and be retried.
            await asyncio.sleep(1.0)
            await asyncio.to_thread(fleet.server.start)
    assert load.wrong == []
    assert load.done == 400
    assert all(worker.process.running for worker in fleet.workers)


async def test_a_long_outage_of_redis_is_reported_and_survived(tmp_path: Path, own_valkey: Server) -> None:
    """Without its queue the Router says 503 with when to come back, is not ready but alive, and recovers by itself."""
    async with Fleet(tmp_path, own_valkey, router={"retry_limit_ms": 2_000}) as fleet:
        await _stays_away(await fleet.up(workers=1))


async def _stays_away(fleet: Fleet) -> None:
    fleet.server.kill()

    async def not_ready() -> bool:
        return (await fleet.router.get("/readyz"))[0] == 503

    await eventually(not_ready, "the Router is not ready", limit_s=15)
    assert (await fleet.router.get("/healthz"))[0] == 200
    begin = time.monotonic()
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=chat("x")) as answer:
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert (await answer.json())["error"]["code"] == "broker_unavailable"
    assert time.monotonic() - begin < 10
    await asyncio.to_thread(fleet.server.start)
    await fleet.router.ready()
    await fleet.until_served(1)
    assert (await ask(fleet, chat("hello")))[0] == 200


async def test_roles_start_in_any_order_without_redis(tmp_path: Path) -> None:
    """Worker first, then Router, then Manager, then Redis: when the last is there, everything serves."""
    binary = server_binary()
    server = Server(binary, tmp_path / "queue")
    async with Fleet(tmp_path, server, router={"redis_url": server.url}) as fleet:
        roles = [fleet.worker("worker-1"), fleet.router, fleet.manager]
        for role in roles:
            role.process.start()
            await asyncio.sleep(0.3)
        assert all(role.process.running for role in roles)
        try:
            await asyncio.to_thread(server.start)
            await asyncio.gather(*(role.ready() for role in roles))
            await fleet.until_served(1)
            assert (await ask(fleet, chat("hello")))[1]["choices"][0]["message"]["content"] == "hello"
        finally:
            server.stop()


async def test_serving_goes_on_without_the_manager(fleet: Fleet) -> None:
    """With the Manager gone for longer than leases and heartbeats last, all requests are answered; back again, it knows
    its fleet, and nobody was declared dead."""
    await fleet.up(workers=2, sim_embedding_dimensions=DIMENSIONS)
    before = {worker["session_id"] for worker in (await fleet.router.page("/fabric/v1/workers"))["workers"]}
    fleet.manager.process.kill()
    begin = time.monotonic()
    while time.monotonic() - begin < 6:
        load = Load(fleet.router.url, 60, 8)
        await load.run()
        assert load.wrong == []
        await asyncio.sleep(0.5)
    await fleet.manager.start()
    await fleet.until_served(2)
    after = {worker["session_id"] for worker in (await fleet.manager.page("/fabric/v1/workers"))["workers"]}
    assert after == before
    assert await ended(fleet, "requeued") == 0
    assert (await ask(fleet, chat("hello")))[0] == 200


async def test_a_worker_joins_through_a_router_when_the_manager_is_back(fleet: Fleet) -> None:
    """Joins wait while the Manager is gone, and happen by themselves."""
    await fleet.up(workers=1)
    fleet.manager.process.kill()
    late = fleet.worker("worker-late")
    late.process.start()
    await eventually(late.process.log_text, "the worker tries", limit_s=20)
    assert (await ask(fleet, chat("hello")))[0] == 200
    await fleet.manager.start()
    await late.ready()
    await fleet.until_served(2)


async def test_a_router_that_dies_takes_its_waiting_jobs_along(fleet: Fleet) -> None:
    """kill -9 of the Router while clients wait: what waits is not run for nobody, the stream that runs is aborted, and
    another Router serves."""
    await fleet.up(workers=1, slots=1, sim_tokens_per_s=2)
    other = await fleet.another_router("router-2").start()
    long_text = " ".join(f"w{number}" for number in range(40))
    waiting = [asyncio.create_task(ask(fleet, chat(long_text, stream=True)))]
    await eventually(lambda: _busy(fleet), "one runs")
    waiting += [asyncio.create_task(ask(fleet, chat(long_text))) for _ in range(3)]

    async def queued() -> bool:
        found = fleet.server.ask("HGETALL", ShardKeys(0).counters)
        return bool(found.get(b"sim:interactive:waiting") == b"3" and found.get(b"sim:interactive:leased") == b"1")

    await eventually(queued, "one runs, three wait")
    fleet.router.process.kill()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(task.exception(), aiohttp.ClientError) for task in waiting)
    # The dead Router's stream lives on for up to a minute; here it is over at once.
    (stream,) = fleet.server.ask("KEYS", "iq:{0}:reply:router.*")
    fleet.server.ask("PEXPIRE", stream, "1")
    async with asyncio.timeout(10):
        status, answer = await ask(fleet, chat("for me"), url=other.url)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "for me")
    assert await ended(fleet, "cancelled") == 4
    assert await ended(fleet, "done") == 1


async def test_a_router_that_is_told_to_stop_finishes_first(fleet: Fleet) -> None:
    """SIGTERM: running requests are answered, new ones are not taken, the process ends with code 0."""
    await fleet.up(workers=1, sim_tokens_per_s=8)
    text = " ".join(f"word{number}" for number in range(12))
    running = asyncio.create_task(ask(fleet, chat(text)))
    await eventually(lambda: _busy(fleet), "the worker runs it")
    fleet.router.process.send(signal.SIGTERM)
    status, answer = await running
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text)
    assert await fleet.router.ended() == 0


async def _busy(fleet: Fleet) -> bool:
    return bool((await fleet.workers[0].page("/status"))["running"])


async def test_everything_stops_cleanly(fleet: Fleet) -> None:
    """SIGTERM to all at once: code 0 everywhere, no traceback in any log, nothing left in the registry or parked."""
    await fleet.up(workers=2)
    await ask(fleet, chat("hello"))
    roles = [*fleet.workers, fleet.router, fleet.manager]
    for worker in fleet.workers:
        worker.process.send(signal.SIGTERM)
    codes = [await worker.ended() for worker in fleet.workers]
    for role in (fleet.router, fleet.manager):
        role.process.send(signal.SIGTERM)
    codes += [await role.ended() for role in (fleet.router, fleet.manager)]
    assert codes == [0] * 4
    for role in roles:
        assert "Traceback" not in role.process.log_text(), role.process.log_tail(80)
    assert fleet.server.ask("HGETALL", ShardKeys(0).renewals) == {}
    assert fleet.server.ask("HGETALL", "iq:workers") == {}
    assert [key for key in fleet.server.ask("KEYS", "iq:*") if b":parked:" in key or b":ctl:" in key] == []


async def test_a_request_survives_a_whole_restart_of_the_control_plane(fleet: Fleet) -> None:
    """Manager and worker are both replaced while a request waits: it is answered by the new worker."""
    await fleet.up(workers=1)
    fleet.workers[0].process.send(signal.SIGTERM)
    await fleet.workers[0].ended()
    fleet.manager.process.kill()
    asked = asyncio.create_task(ask(fleet, chat("still here"), x_inferq_deadline_ms="40000"))
    await asyncio.sleep(0.3)
    assert not asked.done()
    await fleet.manager.start()
    await fleet.worker("worker-new").start()
    async with asyncio.timeout(20):
        status, answer = await asked
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "still here")


async def test_a_taken_port_is_a_clear_error(fleet: Fleet) -> None:
    """Each role says in one sentence which port is taken, and ends with code 2."""
    await fleet.manager.start()
    for role in (fleet.router, fleet.worker("worker-1")):
        role.process.args[role.process.args.index("--port") + 1] = str(fleet.manager.port)
        role.process.start()
        assert await role.ended() == 2
        assert f"port {fleet.manager.port} on 127.0.0.1 is taken" in role.process.log_text()
        assert "Traceback" not in role.process.log_text()


async def test_an_unsuitable_redis_ends_the_manager_with_a_sentence(tmp_path: Path) -> None:
    """A wrong password is not retried for ever: the Manager ends and says what to check."""
    binary = server_binary()
    server = Server(binary, tmp_path / "queue", password="right").start()
    server.process.name = "valkey"
    try:
        async with Fleet(tmp_path, server, manager={"redis_url": f"redis://:wrong@127.0.0.1:{server.port}/0"}) as fleet:
            fleet.manager.process.start()
            assert await fleet.manager.ended() == 2
            assert "check the user and password" in fleet.manager.process.log_text()
            assert "wrong@" not in fleet.manager.process.log_text()
    finally:
        server.stop()
