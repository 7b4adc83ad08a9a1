"""Preemption in a real fleet: batch lines and background work yield to interactive requests, and lose nothing by it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.batches import BatchStorage, add_batcher
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.responses import check_stream
from tests.support.servers import Server
from tests.support.waiting import eventually

CHAT = "/v1/chat/completions"
SLOTS, LINES, TOKENS, LONG = 2, 8, 120, 300
TOKENS_PER_S = 100
LINE_S = TOKENS / TOKENS_PER_S


@pytest.fixture
def shelf(tmp_path: Path) -> BatchStorage:
    return BatchStorage(tmp_path / "store")


@pytest.fixture
async def fleet(valkey: Server, tmp_path: Path, shelf: BatchStorage) -> AsyncIterator[Fleet]:
    """A Router and a batcher; workers are started by the tests."""
    env = {"INFERQ_STORAGE_URL": str(tmp_path / "store")}
    async with Fleet(tmp_path, valkey, env=env) as fleet:
        batcher = add_batcher(fleet, shelf)
        batcher.process.start()
        yield fleet


def body(number: int, tokens: int = TOKENS) -> dict[str, Any]:
    """A chat whose answer has so many tokens, and tells which it is."""
    message = {"role": "user", "content": f"Tell me of number {number}."}
    return {"model": MODEL, "messages": [message], "max_tokens": tokens, "ignore_eos": True}


async def up(fleet: Fleet, workers: int = 1, **flags: object) -> None:
    await fleet.up(workers, slots=SLOTS, sim_mode="text", sim_tokens_per_s=TOKENS_PER_S, **flags)


def submitted(shelf: BatchStorage, lines: int = LINES) -> str:
    requests = ({"custom_id": str(n), "method": "POST", "url": CHAT, "body": body(n)} for n in range(lines))
    return shelf.run(requests)


async def asked(fleet: Fleet, request: dict[str, Any], **headers: str) -> dict[str, Any]:
    """A plain answer."""
    async with fleet.session.post(fleet.router.url + CHAT, json=request, headers=headers) as answer:
        assert answer.status in (200, 202), await answer.text()
        return dict(await answer.json())


async def first_token_s(fleet: Fleet) -> float:
    """How long a short interactive stream takes to its first token."""
    started = time.monotonic()
    async with fleet.session.post(fleet.router.url + CHAT, json=body(99, 8) | {"stream": True}) as answer:
        async for chunk in answer.content:
            if b'"content":"' in chunk and b'"content":""' not in chunk:
                taken = time.monotonic() - started
        return taken


def counted(metrics: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    samples = re.findall(rf"^{name}(\{{.*\}}) ([0-9.e+]+)$", metrics, re.MULTILINE)
    return sum(float(value) for shown, value in samples if all(one in shown for one in wanted))


async def yields(workers: Iterable[Role]) -> float:
    """How many attempts yielded on these workers."""
    pages = [await worker.metrics() for worker in workers]
    return sum(counted(page, "inferq_attempts_total", outcome="yielded") for page in pages)


async def events(fleet: Fleet, event: str) -> float:
    return counted(await fleet.manager.metrics(), "inferq_job_events_total", event=event)


async def until_running(fleet: Fleet, lane: str, jobs: int) -> None:
    async def runs() -> bool:
        return bool((await fleet.depth())["lanes"][lane]["leased"] >= jobs)

    await eventually(runs, f"{jobs} jobs of {lane} run", every_s=0.02)


def shape(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs from one to the next: its id, its time, and what was cached of its prompt."""
    usage = {name: value for name, value in answer["usage"].items() if type(value) is int}
    return {name: value for name, value in answer.items() if name not in ("id", "created", "usage")} | {"usage": usage}


async def check_lines(fleet: Fleet, shelf: BatchStorage, batch_id: str, lines: int = LINES) -> None:
    """Each line is answered once with what the engine answers plainly: text, finish reason, usage and all."""
    batch = await shelf.ended(batch_id, limit_s=60)
    assert batch.progress.completed == lines
    answers = {line["custom_id"]: line["response"] for line in shelf.lines(batch.progress.output_file_id)}
    assert len(answers) == lines
    for number in range(lines):
        assert answers[str(number)]["status_code"] == 200
        assert shape(answers[str(number)]["body"]) == shape(await asked(fleet, body(number)))


async def test_interactive_requests_do_not_wait_for_lines(fleet: Fleet, shelf: BatchStorage) -> None:
    """With every slot taken by lines that need more than a second, the first token comes at once; the lines come out as
    if nothing had happened."""
    await up(fleet)
    batch_id = submitted(shelf)
    await until_running(fleet, "batch", SLOTS)
    taken = []
    for _ in range(3):
        await asyncio.sleep(LINE_S / 4)
        taken.append(await first_token_s(fleet))
    assert sorted(taken)[1] < LINE_S / 4, taken
    assert await yields(fleet.workers) >= 2
    await check_lines(fleet, shelf, batch_id)
    assert await events(fleet, "yielded") >= 2
    assert await events(fleet, "dead") == 0


async def test_lines_that_yield_survive_the_death_of_their_worker(fleet: Fleet, shelf: BatchStorage) -> None:
    """A worker is killed in the moment in which it was asked to yield: its lines run again behind what they had said
    when they yielded before, if they had."""
    await up(fleet, workers=2)
    batch_id = submitted(shelf)
    await until_running(fleet, "batch", 2 * SLOTS)
    victim = fleet.workers[0]
    requests = [asyncio.create_task(asked(fleet, body(50 + n, 8))) for n in range(2)]
    await asyncio.sleep(0.2)
    requests += [asyncio.create_task(asked(fleet, body(60 + n, 8))) for n in range(3)]
    await asyncio.sleep(0.003)
    victim.process.kill()
    await asyncio.gather(*requests)
    await check_lines(fleet, shelf, batch_id)


async def test_a_cancelled_line_does_not_come_back(fleet: Fleet, shelf: BatchStorage) -> None:
    """What yielded and was cancelled then is not run again."""
    await up(fleet)
    background = await asked(fleet, body(1, LONG), **{"x-inferq-background": "true"})
    await until_running(fleet, "background", 1)
    other = await asked(fleet, body(2, LONG), **{"x-inferq-background": "true"})
    await until_running(fleet, "background", 2)
    long = asyncio.create_task(asked(fleet, body(3)))
    await eventually(lambda: _yielded(fleet), "one yields", every_s=0.02)
    for job in (background, other):
        async with fleet.session.post(f"{fleet.router.url}/v1/jobs/{job['id']}/cancel") as answer:
            assert answer.status == 200, await answer.text()
    await long
    depth = (await fleet.depth())["lanes"]["background"]
    assert (depth["waiting"], depth["leased"]) == (0, 0)


async def _yielded(fleet: Fleet) -> bool:
    return await yields(fleet.workers) > 0


async def test_background_work_yields_and_is_whole(fleet: Fleet) -> None:
    """A background response, read as a stream of events all the while, has no gap and no repeat; a plain background
    request has the engine's answer."""
    await up(fleet, preemption_share=1, sim_answer_tokens=2 * LONG)
    url = fleet.router.url + "/v1/responses"
    request = {"model": MODEL, "input": "Tell me of the sea.", "max_output_tokens": LONG, "background": True}
    reading = asyncio.create_task(_events(fleet, url, request | {"stream": True}))
    job = await asked(fleet, body(7, LONG), **{"x-inferq-background": "true"})
    await until_running(fleet, "background", SLOTS)
    await asyncio.sleep(LINE_S / 4)
    assert await first_token_s(fleet) < LINE_S / 2
    await asyncio.gather(*(first_token_s(fleet) for _ in range(2)))
    said = check_stream(await reading)
    again = check_stream(await _events(fleet, url, request | {"stream": True}))
    assert said.output_text == again.output_text
    assert said.usage is not None and again.usage is not None
    assert said.usage.output_tokens == again.usage.output_tokens
    assert await yields(fleet.workers) >= 2

    async def done() -> dict[str, Any] | None:
        found: dict[str, Any] = await fleet.router.page(f"/v1/jobs/{job['id']}")
        return found if found["status"] == "completed" else None

    await eventually(done, "the background request is answered", limit_s=20)
    answered = await fleet.router.page(f"/v1/jobs/{job['id']}/output")
    assert shape(answered) == shape(await asked(fleet, body(7, LONG)))


async def _events(fleet: Fleet, url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream."""
    async with fleet.session.post(url, json=request) as answer:
        assert answer.status == 200
        return [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]


async def test_preemption_can_be_turned_off(valkey: Server, tmp_path: Path, shelf: BatchStorage) -> None:
    """By the batcher, for its lines."""
    async with Fleet(tmp_path, valkey, env={"INFERQ_STORAGE_URL": str(tmp_path / "store")}) as fleet:
        add_batcher(fleet, shelf, max_yields=0).process.start()
        await up(fleet)
        batch_id = submitted(shelf, 4)
        await until_running(fleet, "batch", SLOTS)
        await first_token_s(fleet)
        await check_lines(fleet, shelf, batch_id, 4)
        assert await yields(fleet.workers) == 0
        assert await events(fleet, "asked_to_yield") == 0
