"""One idempotency key is one job while workers, Routers, clients and Redis are killed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from queue_schemas import DEFAULT_BAND, Lane, ShardKeys
from tests.support.fleet import Fleet, Role
from tests.support.sse import without_comments
from tests.support.waiting import eventually

WAITING = ShardKeys(0).queue("sim", Lane.INTERACTIVE, DEFAULT_BAND, "default")
REPLAY = "x-inferq-idempotent-replay"


class Asking:
    """One client that streams the answer to a request with a key, through one Router."""

    def __init__(self, fleet: Fleet, router: Role, key: str, **fields: Any) -> None:
        asked = {"model": "sim", "messages": [{"role": "user", "content": f"tell {key}"}], "max_tokens": 60}
        self._body = asked | {"stream": True, "stream_options": {"include_usage": True}} | fields
        self._session = fleet.session
        self._url = f"{router.url}/v1/chat/completions"
        self._headers = {"idempotency-key": key}
        self.body = b""
        self.status = 0
        self.replay = False
        self.task = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        async with self._session.post(self._url, json=self._body, headers=self._headers) as answer:
            self.status, self.replay = answer.status, answer.headers.get(REPLAY) == "true"
            async for piece in answer.content.iter_any():
                self.body += piece

    async def reached(self, events: int) -> None:
        """Wait until so many events have come."""
        await eventually(lambda: self.body.count(b"\n\n") >= events, f"{events} events came", every_s=0.005)

    async def whole(self) -> bytes:
        """The body, complete: one text with one end."""
        async with asyncio.timeout(40):
            await self.task
        assert self.status == 200, self.body
        *chunks, end = without_comments(self.body).removesuffix(b"\n\n").split(b"\n\n")
        assert end == b"data: [DONE]", self.body[-400:]
        seen = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
        assert not [chunk for chunk in seen if "error" in chunk]
        choices = [choice for chunk in seen for choice in chunk["choices"]]
        assert len({chunk["id"] for chunk in seen}) == 1
        assert len([choice for choice in choices if choice["finish_reason"]]) == 1
        (usage,) = [chunk["usage"] for chunk in seen if chunk.get("usage")]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert len(text) == usage["completion_tokens"] * 4
        return self.body


async def enqueued(fleet: Fleet) -> int:
    """How many jobs there ever were."""
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith(b":enqueued"))


async def runs(worker: Role) -> bool:
    return bool((await worker.page("/status"))["running"])


async def the_one_that_runs(fleet: Fleet) -> Role:
    """The worker that runs the only job."""
    for worker in fleet.workers:
        if worker.process.running and await runs(worker):
            return worker
    raise AssertionError("nobody runs it")


async def test_one_key_is_one_job_whatever_is_killed(fleet: Fleet) -> None:
    """The engine never gives the same answer twice, so a second run would show. Its worker is killed while two clients
    follow one job through two Routers; a client leaves and comes back; a Router is killed and its client asks at the
    other: each time all get the same text, once, and there is one job."""
    other = fleet.another_router("other")
    await fleet.up(
        workers=3, sim_mode="text", sim_nondeterministic=True, sim_answer_tokens=60, sim_tokens_per_s=50, slots=8
    )
    await other.start()

    here = Asking(fleet, fleet.router, "killed worker")
    await here.reached(3)
    there = Asking(fleet, other, "killed worker")
    await there.reached(10)
    (await the_one_that_runs(fleet)).process.kill()
    assert await here.whole() == await there.whole()
    assert (here.replay, there.replay) == (False, True)
    for router in (fleet.router, other):
        metrics = await router.metrics()
        assert 'inferq_streams_interrupted_total{outcome="continued"} 1.0' in metrics
        assert 'how="compared"' not in metrics
        assert 'how="broken"' not in metrics
    assert await enqueued(fleet) == 1

    left = Asking(fleet, fleet.router, "client that left")
    await left.reached(5)
    left.task.cancel()
    await asyncio.gather(left.task, return_exceptions=True)
    back = Asking(fleet, other, "client that left")
    assert (await back.whole()).startswith(left.body)
    assert back.replay
    assert await enqueued(fleet) == 2

    cut = Asking(fleet, other, "killed router")
    await cut.reached(5)
    other.process.kill()
    (broken,) = await asyncio.gather(cut.task, return_exceptions=True)
    assert isinstance(broken, aiohttp.ClientError)
    again = [Asking(fleet, fleet.router, "killed router") for _ in range(2)]
    bodies = [await asking.whole() for asking in again]
    assert bodies[0] == bodies[1]
    assert bodies[0].startswith(cut.body)
    assert await enqueued(fleet) == 3

    wrong = Asking(fleet, fleet.router, "killed router", max_tokens=5)
    await wrong.task
    assert (wrong.status, json.loads(wrong.body)["error"]["code"]) == (422, "idempotency_key_reused")
    late = Asking(fleet, fleet.router, "killed worker")
    assert await late.whole() == here.body


async def test_a_keyed_request_whose_writes_were_lost_is_one_job_again(fleet: Fleet) -> None:
    """The machine of Redis crashed before job and key reached its disk. The two Routers that wait for it both queue it
    again: it is one job, and both get its answer."""
    server = fleet.server
    routers = [fleet.another_router(name, pools="sim", default_deadline_ms=60_000) for name in ("one", "two")]
    await fleet.manager.start()
    await asyncio.gather(*(router.start() for router in routers))
    before = {path: path.stat().st_size for path in (server.folder / "appendonlydir").iterdir()}
    clients = [Asking(fleet, router, "lost") for router in routers]

    async def both_listen() -> bool:
        records = server.ask("KEYS", f"{ShardKeys(0).prefix}listeners:*")
        return len(records) == 1 and server.ask("SCARD", records[0].decode()) == 2

    await eventually(both_listen, "both Routers follow one job")
    server.kill()
    for path, size in before.items():
        with path.open("r+b") as file:
            file.truncate(size)
    await asyncio.to_thread(server.start)
    await eventually(both_listen, "both follow one job again", limit_s=20)
    assert server.ask("XLEN", WAITING) == 1
    flags = {"sim_mode": "text", "sim_nondeterministic": True, "sim_answer_tokens": 60}
    await fleet.worker("late", manager_url=fleet.manager.url, **flags).start()
    assert await clients[0].whole() == await clients[1].whole()
    assert await enqueued(fleet) == 1
