"""Predicted waits in a real fleet: who is told of them, and who is refused by them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.fleet import MODEL, Fleet
from tests.support.servers import Server
from tests.support.waiting import eventually

CHAT = "/v1/chat/completions"
TOKENS, TOKENS_PER_S = 40, 100
RUN_S = TOKENS / TOKENS_PER_S
WAITING = 6


@pytest.fixture
async def fleet(valkey: Server, tmp_path: Path) -> AsyncIterator[Fleet]:
    """One slot, whose pace is known, and a Router that refuses."""
    env = {"INFERQ_ROUTER_ADMISSION": "on", "INFERQ_ROUTER_KEEPALIVE_INTERVAL_MS": "200"}
    async with Fleet(tmp_path, valkey, env=env | {"INFERQ_ROUTER_SWEEP_INTERVAL_MS": "50"}) as fleet:
        await fleet.up(1, slots=1, sim_mode="text", sim_tokens_per_s=TOKENS_PER_S)
        for _ in range(9):
            assert (await asked(fleet, tokens=TOKENS))[0] == 200
        yield fleet


async def asked(fleet: Fleet, *, tokens: int = TOKENS, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """Status, answer and headers of a chat whose answer has so many tokens."""
    message = {"role": "user", "content": "Tell me of the sea."}
    request = {"model": MODEL, "messages": [message], "max_tokens": tokens, "ignore_eos": True}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with fleet.session.post(fleet.router.url + CHAT, json=request, headers=named) as answer:
        return answer.status, await answer.json(), answer.headers


async def backlog(fleet: Fleet) -> list[asyncio.Task[tuple[int, dict[str, Any], Any]]]:
    """A request that runs, and others that wait."""
    tasks = [asyncio.create_task(asked(fleet)) for _ in range(WAITING + 1)]

    async def waits() -> bool:
        return bool((await lane(fleet))["waiting"] == WAITING)

    await eventually(waits, "the others wait", limit_s=5)
    return tasks


async def lane(fleet: Fleet) -> dict[str, Any]:
    async with fleet.session.get(f"{fleet.router.url}/fabric/v1/pools/{MODEL}") as answer:
        found: dict[str, Any] = (await answer.json())["lanes"]["interactive"]
        return found


async def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once(fleet: Fleet) -> None:
    """With when to come back; one that can is served, and so is all that was taken in."""
    tasks = await backlog(fleet)
    begun = asyncio.get_running_loop().time()
    status, answer, headers = await asked(fleet, x_inferq_deadline_ms="500")
    assert asyncio.get_running_loop().time() - begun < 0.5
    assert (status, answer["error"]["code"]) == (429, "wait_too_long")
    assert WAITING * RUN_S * 500 < answer["error"]["predicted_wait_ms"] < WAITING * RUN_S * 2_500
    assert int(headers["retry-after"]) >= 1
    assert (await asked(fleet, x_inferq_deadline_ms="60000"))[0] == 200
    assert [(await task)[0] for task in tasks] == [200] * (WAITING + 1)


async def test_a_request_that_may_not_wait_is_refused_where_it_would(fleet: Fleet) -> None:
    """And served at once where a slot is free."""
    tasks = await backlog(fleet)
    status, answer, _ = await asked(fleet, x_inferq_do_not_queue="true")
    assert (status, answer["error"]["code"]) == (429, "wait_too_long")
    await asyncio.gather(*tasks)

    async def is_served() -> bool:
        return (await asked(fleet, x_inferq_do_not_queue="true"))[0] == 200

    await eventually(is_served, "a free slot takes it", limit_s=5)
    assert (await asked(fleet, x_inferq_do_not_queue="perhaps"))[0] == 400


async def test_a_waiting_stream_is_told_its_place(fleet: Fleet) -> None:
    """In comments, which no client takes for events."""
    tasks = await backlog(fleet)
    message = {"role": "user", "content": "Tell me of the sea."}
    request = {"model": MODEL, "messages": [message], "max_tokens": 5, "stream": True, "ignore_eos": True}
    async with fleet.session.post(fleet.router.url + CHAT, json=request) as answer:
        text = (await answer.read()).decode()
    comments = [line for line in text.splitlines() if line.startswith(": queued")]
    assert "until it starts" in comments[0]
    positions = [int(part.removeprefix("position ")) for line in comments for part in line.split(", ")
                 if part.startswith("position ")]  # fmt: skip
    assert positions == sorted(positions, reverse=True)
    assert 1 <= positions[0] <= WAITING + 1
    assert text.rstrip().endswith("data: [DONE]")
    await asyncio.gather(*tasks)


async def test_a_background_job_and_a_pool_tell_how_long_is_waited(fleet: Fleet) -> None:
    """And the worker tells afterwards how wrong that was."""
    tasks = await backlog(fleet)
    _, job, _ = await asked(fleet, x_inferq_background="true")
    async with fleet.session.get(f"{fleet.router.url}/v1/jobs/{job['id']}") as answer:
        shown = await answer.json()
    assert shown["status"] == "queued"
    assert 1 <= shown["queue_position"] <= WAITING + 1
    assert 0 < shown["predicted_wait_ms"] < WAITING * RUN_S * 2_500
    found = await lane(fleet)
    assert found["cost"] > 0
    assert found["ms_per_cost"] > 0
    assert found["predicted_wait_ms"] > 0
    await asyncio.gather(*tasks)

    async def has_ended() -> bool:
        async with fleet.session.get(f"{fleet.router.url}/v1/jobs/{job['id']}") as answer:
            ended = await answer.json()
            return bool(ended["status"] == "completed" and ended["queue_position"] is None)

    await eventually(has_ended, "the job has its answer", limit_s=10)
    (worker,) = fleet.workers
    async with aiohttp.ClientSession() as session, session.get(f"{worker.url}/metrics") as answer:
        assert f'inferq_predicted_wait_error_ratio_count{{lane="interactive",model="{MODEL}"}}' in await answer.text()
