"""Workers that reach nothing but a Router: no Redis, no Manager, no port of their own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from queue_schemas import (
    END,
    HEAD,
    BrokerUnavailable,
    EngineState,
    Frame,
    Heartbeat,
    Lane,
    ManagerUnavailable,
    Outcome,
    Pool,
    Registration,
    Settled,
    new_session_id,
)
from tests.support.fleet import Fleet, Role
from tests.support.load import DIMENSIONS, Load
from tests.support.servers import Server
from tests.support.sse import read_data
from tests.support.waiting import eventually
from worker.over_http.manager_client import HttpManagerClient
from worker.over_http.queue import HttpQueue
from worker.registration.addresses import Addresses

TOKEN = "the fleet's"
KEYS = ("first key", "second key", "third key")


def credentials(*, revoked: int = 0, **more: str) -> str:
    """A table for each worker; ``revoked`` of them have no valid key. ``more``: further digests, by table."""
    tables = []
    for number, key in enumerate(KEYS, 1):
        digests = [] if number <= revoked else [hashlib.sha256(key.encode()).hexdigest()]
        digests += [hashlib.sha256(value.encode()).hexdigest() for name, value in more.items() if name == f"w{number}"]
        tables.append(f'[w{number}]\nsha256 = {json.dumps(digests)}\nmodels = ["sim", "tuned"]\n')
    return "\n".join(tables)


@asynccontextmanager
async def fleet_of(
    folder: Path, server: Server, workers: int, routers: int = 1, lease_ms: int = 1_500, **flags: object
) -> AsyncIterator[Fleet]:
    """A fleet whose workers have a key each, and the addresses of its Routers: nothing else."""
    file = folder / "workers.toml"
    file.write_text(credentials())
    async with Fleet(
        folder, server, manager={"lease_ms": lease_ms}, router={"worker_credentials_file": file},
        env={"INFERQ_JOIN_TOKEN": TOKEN},
    ) as fleet:  # fmt: skip
        fleet.session.headers["x-inferq-join-token"] = TOKEN
        others = [
            fleet.another_router(f"router-{number}", worker_credentials_file=file) for number in range(2, routers + 1)
        ]
        roles: list[Role] = [fleet.manager, fleet.router, *others]
        urls = ",".join(router.url for router in roles[1:])
        with fleet.having({"INFERQ_JOIN_TOKEN": ""}):
            settings = {"model": "sim,tuned", "slots": 16, "sim_embedding_dimensions": DIMENSIONS} | flags
            roles += [
                fleet.worker(f"w{number}", key=KEYS[number - 1], **settings | {"manager_url": urls})
                for number in range(1, workers + 1)
            ]
        for role in roles:
            role.process.start()
        await asyncio.gather(*(role.ready() for role in roles))
        if workers:
            await fleet.until_served(workers)
        yield fleet


async def test_requests_survive_killed_workers_and_a_killed_router(tmp_path: Path, own_valkey: Server) -> None:
    """Under load a worker is killed, another one drained, and the Router restarted that all workers call: of 1,200
    mixed requests through another Router none fails and none is mixed up."""
    async with fleet_of(tmp_path, own_valkey, workers=3, routers=2) as fleet:
        serving = fleet._everything[2]
        assert serving.name == "router-2"
        load = Load(serving.url, 1_200, 48, models=("sim", "tuned"))
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await load.reached(0.2)
            fleet.workers[0].process.kill()
            await load.reached(0.4)
            await fleet.router.restart()
            await load.reached(0.6)
            fleet.workers[1].process.send(signal.SIGTERM)
        assert load.wrong == []
        assert load.done == 1_200
        assert await fleet.workers[1].ended() == 0


async def test_a_stream_outlives_its_worker_and_the_router_that_it_called(tmp_path: Path, own_valkey: Server) -> None:
    """A stream that a killed worker had begun continues at another one, word for word; so does a background job, whose
    delivered part the next worker has from a Router."""
    words = " ".join(f"word{number}" for number in range(120))
    async with fleet_of(tmp_path, own_valkey, workers=2, sim_tokens_per_s=60) as fleet:
        body = {"model": "sim", "stream": True, "messages": [{"role": "user", "content": words}]}
        url = f"{fleet.router.url}/v1/chat/completions"
        kept = asyncio.ensure_future(fleet.session.post(url, json=body, headers={"idempotency-key": "one"}))
        async with fleet.session.post(url, json=body) as answer:
            pieces = read_data(answer)
            said = [await anext(pieces) for _ in range(10)]
            runs = await asyncio.gather(*(worker.page("/status") for worker in fleet.workers))
            victim = max(zip(runs, fleet.workers, strict=True), key=lambda one: one[0]["running"])[1]
            victim.process.kill()
            said += [piece async for piece in pieces]
        assert _text(said) == words
        assert _text([piece async for piece in read_data(await kept)]) == words


async def test_a_key_is_rotated_and_another_revoked_while_requests_run(tmp_path: Path, own_valkey: Server) -> None:
    """With two digests a worker's old key is good until it has the new one. A revoked key ends its worker's part within
    a lease: its jobs run elsewhere, and none fails."""
    async with fleet_of(tmp_path, own_valkey, workers=2) as fleet:
        file = tmp_path / "workers.toml"
        load = Load(fleet.router.url, 500, 16)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await load.reached(0.1)
            file.write_text(credentials(w2="a new key"))
            await load.reached(0.3)
            file.write_text(credentials(revoked=1, w2="a new key"))
            await eventually(
                lambda: "refuses this worker's credential" in fleet.workers[0].process.log_tail(50), "it is refused"
            )
        assert load.wrong == []
        await fleet.until_served(1)
        file.write_text(credentials())
        await fleet.until_served(2)


async def test_the_queue_is_restarted_under_workers_over_http(tmp_path: Path, own_valkey: Server) -> None:
    """Redis is killed and comes back without its latest writes: workers say what they run, and no request fails."""
    async with fleet_of(tmp_path, own_valkey, workers=2, routers=1) as fleet:
        load = Load(fleet.router.url, 400, 24)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await load.reached(0.3)
            own_valkey.kill()
            await asyncio.sleep(0.5)
            own_valkey.start()
        assert load.wrong == []


async def test_a_worker_over_http_yields_what_it_said(tmp_path: Path, own_valkey: Server) -> None:
    """A background request gives its slot to an interactive one, and goes on behind what it said, at any worker."""
    words = " ".join(f"w{number}" for number in range(60))
    async with fleet_of(tmp_path, own_valkey, workers=1, slots=1, sim_tokens_per_s=40) as fleet:
        chat = {"model": "sim", "messages": [{"role": "user", "content": words}]}
        url = f"{fleet.router.url}/v1/chat/completions"
        async with fleet.session.post(url, json=chat, headers={"x-inferq-background": "true"}) as accepted:
            job_id = (await accepted.json())["id"]
        await eventually(lambda: _runs(fleet.workers[0]), "the background request runs")
        await asyncio.sleep(0.4)
        began = asyncio.get_running_loop().time()
        short = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}
        async with fleet.session.post(url, json=short) as answer:
            assert (await answer.json())["choices"][0]["message"]["content"] == "hello"
        assert asyncio.get_running_loop().time() - began < 1.2, "it waited for the background request to end"

        async def ended() -> bool:
            job = await fleet.router.page(f"/v1/jobs/{job_id}")
            return bool(job["status"] == "completed")

        await eventually(ended, "the background request ends", limit_s=20)
        async with fleet.session.get(f"{fleet.router.url}/v1/jobs/{job_id}/output") as response:
            assert words in await response.text()


def _text(data: list[str]) -> str:
    chunks = [json.loads(one) for one in data if one != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


async def _runs(worker: Role) -> bool:
    return bool((await worker.page("/status"))["running"])


async def test_a_worker_that_may_not_do_what_it_asks_says_so_and_ends(tmp_path: Path, own_valkey: Server) -> None:
    """A key that is not known, or for another worker or other models: one sentence, exit code 2."""
    async with fleet_of(tmp_path, own_valkey, workers=1) as fleet:
        with fleet.having({"INFERQ_JOIN_TOKEN": ""}):
            cases = [
                (fleet.worker("w2", key="wrong", manager_url=fleet.router.url), "credential"),
                (fleet.worker("other", key=KEYS[1], manager_url=fleet.router.url), "for workers called w2"),
                (
                    fleet.worker("w3", key=KEYS[2], model="secret", manager_url=fleet.router.url),
                    "does not allow the model",
                ),
            ]
        for role, _ in cases:
            role.process.start()
        for role, sentence in cases:
            assert await role.ended() == 2
            assert sentence in role.process.log_tail(5)


async def test_a_hundred_workers_go_on_when_their_router_is_restarted(tmp_path: Path, own_valkey: Server) -> None:
    """Their sessions and leases stand: each finds the Router again by itself, and every one answers its job."""
    # As by default, a lease outlasts the restart of a Router.
    async with fleet_of(tmp_path, own_valkey, workers=0, lease_ms=15_000) as fleet:
        addresses = Addresses([fleet.router.url], {"x-inferq-join-token": TOKEN})
        waiting = [asyncio.create_task(_answer_one_job(addresses, number)) for number in range(100)]

        async def joined() -> bool:
            workers = (await fleet.router.page("/fabric/v1/workers"))["workers"]
            return len(workers) == 100

        await eventually(joined, "all have joined", limit_s=20)
        await fleet.router.restart()
        await fleet.until_served(100)
        url = f"{fleet.router.url}/v1/chat/completions"
        body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}

        async def ask() -> int:
            async with fleet.session.post(url, json=body) as answer:
                await answer.read()
                return answer.status

        assert await asyncio.gather(*(ask() for _ in range(100))) == [200] * 100
        assert await asyncio.gather(*waiting) == [True] * 100


async def _answer_one_job(addresses: Addresses, number: int) -> bool:
    """A worker that waits for one job, answers it and leaves; whether its session was the same all the time."""
    session_id = new_session_id(f"one-of-many-{number}")
    client, queue = HttpManagerClient(addresses), HttpQueue(addresses, 1)
    status = {"session_id": session_id, "models": ["sim"], "slots": 1, "engine": EngineState.READY}
    await client.register(Registration(worker_id=f"one-of-many-{number}", **status))
    await queue.workers.join(session_id)
    renewing = asyncio.create_task(_report(client, Heartbeat(**status)))
    pools, after, seq = [(Pool("sim"), tuple(Lane))], "0", 1
    try:
        while True:
            try:
                leases = (await queue.workers.claim(0, session_id, seq, 0, 1, pools, slots=1, capacity=1)).leases
                if leases:
                    frame = Frame(
                        leases[0].job.id, 1, leases[0].attempt_id, 0, HEAD | END, b"{}", 200, "application/json"
                    )
                    settled = await queue.attempts.settle(leases[0], Outcome.DONE, frame.pack())
                    await queue.workers.leave(session_id)
                    return settled is Settled.OK
                for message_id, _ in await queue.workers.read_control(0, session_id, after, 5_000):
                    after = message_id
                seq += 1
            except BrokerUnavailable:
                await asyncio.sleep(0.2)
    finally:
        renewing.cancel()
        await client.close()
        await queue.close()


async def _report(client: HttpManagerClient, heartbeat: Heartbeat) -> None:
    while True:
        with contextlib.suppress(ManagerUnavailable):
            await client.heartbeat("", heartbeat)
        await asyncio.sleep(0.4)
