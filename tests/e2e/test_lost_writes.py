"""Redis loses its newest writes in a crash: what somebody still waits for is queued again."""

from __future__ import annotations

import asyncio

from queue_schemas import DEFAULT_BAND, Lane, ShardKeys
from tests.support.fleet import Fleet
from tests.support.waiting import eventually

WAITING = ShardKeys(0).queue("sim", Lane.INTERACTIVE, DEFAULT_BAND, "default")


async def test_a_request_whose_writes_were_lost_is_answered(fleet: Fleet) -> None:
    """The machine of Redis crashed before the last writes reached its disk; the Router queues the request again."""
    server = fleet.server
    router = fleet.another_router("declares", pools="sim", default_deadline_ms=60_000)
    await fleet.manager.start()
    await router.start()
    before = {path: path.stat().st_size for path in (server.folder / "appendonlydir").iterdir()}

    async def ask() -> int:
        body = {"model": "sim", "prompt": "x", "max_tokens": 4}
        async with fleet.session.post(f"{router.url}/v1/completions", json=body) as answer:
            return answer.status

    asking = asyncio.create_task(ask())
    await eventually(lambda: server.ask("XLEN", WAITING) == 1, "the request waits")
    server.kill()
    for path, size in before.items():
        with path.open("r+b") as file:
            file.truncate(size)
    await asyncio.to_thread(server.start)
    await eventually(lambda: server.ask("XLEN", WAITING) == 1, "the request waits again", limit_s=20)
    await fleet.worker("late", manager_url=fleet.manager.url).start()
    async with asyncio.timeout(40):
        assert await asking == 200
