"""Workers whose clock is an hour off."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from pathlib import Path

from queue_schemas.keys import ShardKeys
from tests.support.clocks import HOUR_S, clock_off_by
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

LEASE_S = 1.5
DEADLINE_S = 1.0


class FleetWithClocks(Fleet):
    """A fleet in which a worker may have a clock of its own."""

    def worker_off_by(self, seconds: int, name: str) -> Role:
        """A worker, not started yet, whose wall clock is off; it serves a model of its own name."""
        with self.having(clock_off_by(seconds, self.folder)):
            return self.worker(name, model=name, sim_tokens_per_s=20)


async def test_an_hour_ahead_or_behind_changes_nothing(tmp_path: Path, own_valkey: Server) -> None:
    """Two workers, an hour ahead and an hour behind, serve for longer than a lease, keep their sessions, and hold
    deadlines; only their logs tell another time."""
    manager = {"lease_ms": int(LEASE_S * 1000), "probe_timeout_ms": 200, "ping_timeout_ms": 200}
    async with FleetWithClocks(tmp_path, own_valkey, manager=manager) as fleet:
        offs = {"ahead": HOUR_S, "behind": -HOUR_S}
        for name, seconds in offs.items():
            fleet.worker_off_by(seconds, name)
        for role in (fleet.manager, fleet.router, *fleet.workers):
            role.process.start()
        await asyncio.gather(*(role.ready() for role in (fleet.manager, fleet.router, *fleet.workers)))
        await asyncio.gather(*(fleet.until_served(1, name) for name in offs))
        before = [(await worker.page("/status"))["session_id"] for worker in fleet.workers]
        begin = time.monotonic()
        while time.monotonic() - begin < 2 * LEASE_S:
            for name in offs:
                assert await _ask(fleet, name, "hello there") == (200, "hello there")
        await asyncio.gather(*(_runs_out(fleet, name) for name in offs))
        assert [(await worker.page("/status"))["session_id"] for worker in fleet.workers] == before
        totals = await asyncio.to_thread(fleet.server.ask, "HGETALL", ShardKeys(0).counters)
        assert [name for name in totals if name.endswith(b":requeued")] == []
        assert "session_declared_dead" not in fleet.manager.process.log_text()
        for worker, seconds in zip(fleet.workers, offs.values(), strict=True):
            first = json.loads(worker.process.log_text().splitlines()[0])
            told = datetime.fromisoformat(first["time"])
            assert abs((told - datetime.now(UTC)).total_seconds() - seconds) < HOUR_S / 2


async def _ask(fleet: Fleet, model: str, text: str, **headers: str) -> tuple[int, str]:
    """Status, and the answer or the error's code."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body, headers=named) as answer:
        page = await answer.json()
        return answer.status, page["error"]["code"] if "error" in page else page["choices"][0]["message"]["content"]


async def _runs_out(fleet: Fleet, model: str) -> None:
    """A request that takes ten seconds ends when its own time is over, and its slot is free."""
    begin = time.monotonic()
    deadline = str(int(DEADLINE_S * 1000))
    status, code = await _ask(fleet, model, "word " * 200, x_inferq_deadline_ms=deadline)
    assert (status, code) == (504, "deadline_exceeded")
    assert DEADLINE_S * 0.9 < time.monotonic() - begin < 8

    async def free() -> bool:
        pages = [await worker.page("/status") for worker in fleet.workers]
        return all(page["running"] == 0 for page in pages if page["models"] == [model])

    await eventually(free, "its slot is free")
