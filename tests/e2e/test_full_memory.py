"""The memory of Redis is full: new work is refused clearly, what runs ends, nobody is lost, and then all goes on."""

from __future__ import annotations

import asyncio

from queue_schemas import State
from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet
from tests.support.sse import read_data
from tests.support.waiting import eventually

WORDS = " ".join(f"w{number}" for number in range(40))


async def ask(fleet: Fleet, text: str) -> tuple[int, str, str | None]:
    """A plain chat: status, text of the answer or the error's code and message, and when to come back."""
    body = {"model": "sim", "messages": [{"role": "user", "content": text}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        found = await answer.json()
        if answer.status == 200:
            return 200, found["choices"][0]["message"]["content"], None
        return (
            answer.status,
            f"{found['error']['code']}: {found['error']['message']}",
            answer.headers.get("retry-after"),
        )


async def stream(fleet: Fleet, text: str) -> list[str]:
    """The data of a streamed completion's events."""
    body = {"model": "sim", "prompt": text, "stream": True, "max_tokens": 200}
    async with fleet.session.post(f"{fleet.router.url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        return [data async for data in read_data(answer)]


async def test_full_memory_refuses_new_work_and_ends_the_old(fleet: Fleet) -> None:
    """New work gets 503 with the cause and when to come back. Streams and plain requests that run are answered whole
    while memory is still full, the worker keeps its leases, the Manager acts; once there is room, serving goes on by
    itself."""
    await fleet.up(workers=1, sim_tokens_per_s=20)
    running = [asyncio.create_task(ask(fleet, WORDS)) for _ in range(2)]
    streams = [asyncio.create_task(stream(fleet, WORDS)) for _ in range(2)]

    async def leased() -> bool:
        return bool((await fleet.depth())["leased"] == 4)

    await eventually(leased, "all four run")
    fleet.server.ask("CONFIG", "SET", "maxmemory", "1")

    status, reason, retry_after = await ask(fleet, "too much")
    assert (status, reason.partition(":")[0]) == (503, "broker_full")
    assert "free memory" in reason
    assert retry_after is not None
    async with asyncio.timeout(40):
        assert [answer[:2] for answer in await asyncio.gather(*running)] == [(200, WORDS)] * 2
        for events in await asyncio.gather(*streams):
            assert events[-1] == "[DONE]"

    def number() -> int:
        (heartbeat,) = fleet.server.ask("HVALS", ShardKeys(0).renewals)
        return int(heartbeat)

    before = number()
    await eventually(lambda: number() > before, "the worker renews its leases")
    assert (await fleet.manager.get("/readyz"))[0] == 200
    assert (await ask(fleet, "still too much"))[0] == 503

    fleet.server.ask("CONFIG", "SET", "maxmemory", "0")
    assert (await ask(fleet, "room again"))[:2] == (200, "room again")
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    counts = {name.rpartition(b":")[2]: int(count) for name, count in totals.items()}
    states = {state.value.encode() for state in State} | {b"enqueued", b"requeued", b"waiting", b"leased"}
    assert {name: count for name, count in counts.items() if count and name in states} == {b"enqueued": 5, b"done": 5}
