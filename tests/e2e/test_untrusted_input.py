"""A whole fleet, with garbage in every place of Redis that it reads."""

from __future__ import annotations

from typing import Any

from queue_schemas import new_job_id
from queue_schemas.keys import POOLS, WORKERS, ShardKeys
from tests.support.fleet import Fleet

GARBAGE = (b"\xff\xfe\x00", b"\xc1" * 50, b"{", b"[" * 5_000, b"\x1b[2J\r\nabort", b"")


async def test_a_fleet_serves_on_with_garbage_in_redis(fleet: Fleet) -> None:
    """Router, Worker and Manager, also one newly started, pass over what they cannot read."""
    await fleet.up(workers=1)
    ask = fleet.server.ask
    streams = [key for kind in ("reply", "ctl") for key in ask("KEYS", f"*:{kind}:*")]
    assert len(streams) == 2
    for garbage in GARBAGE:
        for key in streams:
            for field in ("f", "m", "k", garbage or "x"):
                ask("XADD", key, "NOMKSTREAM", "*", field, garbage)
            ask("XADD", key, "NOMKSTREAM", "*", "k", "abort", "job", garbage)
        ask("XADD", f"{ShardKeys(0).prefix}q:sim:interactive:1:default", "*", "id", garbage or new_job_id(0))
        for key in (WORKERS, POOLS, ShardKeys(0).renewals):
            ask("HSET", key, garbage, garbage)
    assert await _answer(fleet) == (200, "hello")
    fleet.manager.process.kill()
    await fleet.manager.start()
    assert await _answer(fleet) == (200, "hello")
    assert len((await fleet.manager.page("/fabric/v1/workers"))["workers"]) == 1
    assert [pool["model"] for pool in (await fleet.manager.page("/fabric/v1/pools"))["pools"]] == ["sim"]
    assert all(role.process.running for role in (fleet.manager, fleet.router, *fleet.workers))
    assert "Traceback" not in "".join(role.process.log_text() for role in (fleet.manager, fleet.router, *fleet.workers))


async def _answer(fleet: Fleet) -> tuple[int, Any]:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        page = await answer.json()
        return answer.status, page["choices"][0]["message"]["content"] if "choices" in page else page
