"""``service_tier`` of a request: where its job waits, and what its client is told."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
import pytest

from queue_schemas import Job, Lane
from queue_schemas.lanes import DEFAULT_BAND
from tests.unit.router.fakes import Answer, Client, FakeQueue, router

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
HEADER = "x-inferq-service-tier"
KEYS = {"api_keys": f"{hashlib.sha256(b'sk-1').hexdigest()}:acme", "tenant_limits": {"acme": {"highest_band": 2}}}


async def asked(tier: object, headers: dict[str, str] | None = None, **settings: Any) -> tuple[Job, Answer]:
    """The job of a chat with this tier, and its answer."""
    queue = FakeQueue("m")
    async with router(queue, **settings) as app:
        answer = Client(app).post(CHAT | {"service_tier": tier}, headers=headers)
        job = await queue.job()
        queue.answer(job, b'{"service_tier": null}')
        await answer.done()
    assert orjson.loads(job.body)["service_tier"] == tier
    assert answer.body == b'{"service_tier": null}', "the engine's body passes unchanged"
    return job, answer


@pytest.mark.parametrize(
    ("tier", "lane", "band", "told"),
    [
        ("flex", Lane.BACKGROUND, DEFAULT_BAND, "flex"),
        ("priority", Lane.INTERACTIVE, 0, "priority"),
        ("default", Lane.INTERACTIVE, DEFAULT_BAND, "default"),
        ("auto", Lane.INTERACTIVE, DEFAULT_BAND, "default"),
        ("standard_only", Lane.INTERACTIVE, DEFAULT_BAND, "default"),
        (None, Lane.INTERACTIVE, DEFAULT_BAND, None),
        (7, Lane.INTERACTIVE, DEFAULT_BAND, None),
    ],
)
async def test_a_tier_decides_lane_and_band(tier: object, lane: Lane, band: int, told: str | None) -> None:
    """And the answer's header says which was used; other words are the engine's matter."""
    job, answer = await asked(tier)
    assert (job.lane, job.band, job.persisted, job.yields) == (lane, band, False, 0)
    assert answer.headers.get(HEADER) == told


async def test_a_tier_that_a_tenant_may_not_have_is_the_default_one() -> None:
    """Its highest band is the default band: the request runs, and says so."""
    job, answer = await asked("priority", {"authorization": "Bearer sk-1"}, **KEYS)
    assert (job.band, answer.headers[HEADER]) == (DEFAULT_BAND, "default")


async def test_streams_and_requests_with_headers_of_ours_name_their_tier_too() -> None:
    """On the ways through a task as well."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        for headers in ({}, {"x-inferq-resumable": "true"}, {"idempotency-key": "k"}):
            answer = Client(app).post(CHAT | {"service_tier": "flex", "stream": True}, headers=headers)
            job = await queue.job()
            queue.stream(job, b"data: [DONE]\n\n")
            await answer.done()
            assert (job.lane, answer.headers[HEADER]) == (Lane.BACKGROUND, "flex")


async def test_a_response_built_from_a_chat_names_its_tier() -> None:
    """In its object, as OpenAI's API does: that body is ours to write."""
    queue = FakeQueue("m")
    request = {"model": "m", "input": "hi", "background": True, "service_tier": "priority"}
    async with router(queue, **KEYS) as app:
        answer = await Client(app).post(request, "/v1/responses", headers={"authorization": "Bearer sk-1"}).done()
        job = await queue.job()
    assert (answer.json()["service_tier"], answer.headers[HEADER]) == ("default", "default")
    assert b"service_tier" not in job.body
