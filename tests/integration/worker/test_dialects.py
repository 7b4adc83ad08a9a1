"""A worker beside each engine that is not vLLM, as its documents and source say that it answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from queue_schemas import CONTINUED, MarkerKind
from tests.support.engines import ANSWER, FAKES, FakeEngine
from tests.support.engines.fake import events_of
from tests.support.waiting import eventually

from .fleet import Answer, Client, LocalFleet, LocalWorker

GOES_ON = ("llamacpp", "sglang", "tgi")
PREFIX = ANSWER[:14]
TELLS_LOAD = ("llamacpp", "sglang", "tgi")


@asynccontextmanager
async def beside(fleet: LocalFleet, client: Client, name: str) -> AsyncIterator[tuple[FakeEngine, LocalWorker]]:
    """An engine of that name with the only worker that serves it, which has 8 slots for its two."""
    async with FAKES[name]().serving() as fake:
        options = ("--engine", "url", "--engine-url", fake.url, "--slots", "8", "--engine-load-interval-ms", "50")
        worker = await fleet.worker("w1", *options).until_ready()
        await client.until_listed("w1")
        yield fake, worker


def text_of(answer: Answer) -> str:
    """What a stream said."""
    assert answer.body.endswith(b"data: [DONE]\n\n")
    return "".join(
        choice["delta"].get("content") or "" for chunk in events_of(answer.body) for choice in chunk["choices"]
    )


@pytest.mark.parametrize("name", FAKES)
async def test_chats_are_answered_plain_and_streamed(fleet: LocalFleet, client: Client, name: str) -> None:
    """To the last byte, under each of its models."""
    async with beside(fleet, client, name) as (fake, _):
        plain = await client.ask(model=fake.model, max_tokens=500)
        assert (plain.status, json.loads(plain.body)["choices"][0]["message"]["content"]) == (200, ANSWER)
        assert text_of(await client.ask(model=fake.model, stream=True, max_tokens=500)) == ANSWER


@pytest.mark.parametrize("name", FAKES)
async def test_a_cancelled_stream_is_aborted_by_closing_its_connection(
    fleet: LocalFleet, client: Client, name: str
) -> None:
    """Which the engine sees."""
    async with beside(fleet, client, name) as (fake, worker):
        fake.pace_s = 0.2
        job = await client.send(model=fake.model, stream=True, max_tokens=500)
        await client.begun(job)
        await client.broker.jobs.cancel(job, "the client went away")
        await eventually(lambda: fake.aborted == 1, "the engine sees that it is gone", limit_s=5)
        assert (fake.running, worker.running) == (0, 0)
        assert client.answers[job].markers[-1].kind is MarkerKind.CANCELLED


@pytest.mark.parametrize("name", FAKES)
async def test_a_cut_stream_goes_on_or_honestly_starts_again(fleet: LocalFleet, client: Client, name: str) -> None:
    """What its next attempt says is the rest, and said to be that; or all of it, which a Router compares."""
    async with beside(fleet, client, name) as (fake, _):
        answer = await client.ask(model=fake.model, stream=True, max_tokens=500, prefix=PREFIX)
        goes_on = name in GOES_ON
        assert bool(answer.frames[0].flags & CONTINUED) is goes_on
        assert text_of(answer) == (ANSWER[len(PREFIX) :] if goes_on else ANSWER)
        assert len(fake.asked) == 1


@pytest.mark.parametrize("name", FAKES)
async def test_slots_follow_what_its_metrics_tell(fleet: LocalFleet, client: Client, name: str) -> None:
    """Down to what it runs at a time; where it tells nothing, they stay."""
    async with beside(fleet, client, name) as (fake, worker):
        jobs = [await client.send(model=fake.model, stream=True, max_tokens=100) for _ in range(36)]
        if name in TELLS_LOAD:
            await eventually(lambda: worker.worker.status().slots <= 4, "the slots follow", limit_s=20)
            await eventually(lambda: fake.waiting <= 2, "its queue drains", limit_s=20)
        for job in jobs:
            assert (await client.answer(job, limit_s=60)).status == 200
        if name not in TELLS_LOAD:
            assert worker.worker.status().slots == 8
