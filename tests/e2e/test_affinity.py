"""Affinity in a real fleet: conversations return to the worker that holds them, and survive its death."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import MODEL, Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

WORKERS, CONVERSATIONS, TURNS = 3, 12, 3
CHUNK = "All of this was said before, word for word. " * 30


@pytest.fixture
async def fleet(valkey: Server, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with Fleet(tmp_path, valkey) as fleet:
        yield fleet


class Conversations:
    """Clients that send all that was said so far with each turn."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._said: list[list[dict[str, str]]] = [
            [{"role": "system", "content": f"You are number {number}. {CHUNK}"}] for number in range(CONVERSATIONS)
        ]

    async def turn(self) -> list[float]:
        """One turn of each, one after the other. Answers which share of its prompt each found in a cache."""
        return [await self._turn(said) for said in self._said]

    async def _turn(self, said: list[dict[str, str]]) -> float:
        said.append({"role": "user", "content": f"And then? {CHUNK}"})
        request: dict[str, Any] = {"model": MODEL, "messages": said, "max_tokens": 4}
        async with self._fleet.session.post(f"{self._fleet.router.url}/v1/chat/completions", json=request) as answer:
            assert answer.status == 200, await answer.text()
            found = await answer.json()
        said.append(found["choices"][0]["message"])
        usage = found["usage"]
        return float((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) / usage["prompt_tokens"])


async def outcomes(manager: Role) -> dict[str, float]:
    found = re.findall(r'inferq_jobs_affinity_total{.*outcome="(\w+)"} (\S+)', await manager.metrics())
    return {outcome: float(count) for outcome, count in found}


async def test_conversations_return_to_their_workers(fleet: Fleet) -> None:
    """Each turn finds what came before in a cache, and all workers have a part of the load. A favourite worker that is
    killed costs its conversations one cold turn, and nothing else."""
    await fleet.up(WORKERS, slots=4, sim_mode="text")
    talks = Conversations(fleet)
    assert max(await talks.turn()) == 0
    for turn in range(1, TURNS):
        assert min(await talks.turn()) >= 0.9 * turn / (turn + 1)

    async def counted() -> bool:
        return await outcomes(fleet.manager) == {"cold": CONVERSATIONS, "warm": CONVERSATIONS * (TURNS - 1)}

    await eventually(counted, "the Manager counts each attempt")
    served = [_jobs(await worker.metrics()) for worker in fleet.workers]
    assert sum(served) == CONVERSATIONS * TURNS
    assert min(served) > 0

    favourite = fleet.workers[served.index(max(served))]
    favourite.process.kill()
    shares = await asyncio.wait_for(talks.turn(), 60)
    cold = sum(share == 0 for share in shares)
    assert 0 < cold <= max(served) / TURNS + 1
    assert min(await talks.turn()) >= 0.6


def _jobs(metrics: str) -> int:
    return int(sum(float(count) for count in re.findall(r'inferq_attempts_total{.*outcome="done"} (\S+)', metrics)))
