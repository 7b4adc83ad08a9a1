"""Deadlines: the caller's, the client's own time-out, or a setting's; errors say which one passed."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from queue_schemas import MarkerKind
from router.inference.rules import find_deadline
from tests.support.waiting import eventually
from tests.unit.router.fakes import Client, FakeQueue, router
from tests.unit.router.served import served

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": MESSAGES}
READ, WHOLE = b"x-stainless-read-timeout", b"x-stainless-timeout"


@pytest.mark.parametrize(
    ("headers", "body_s", "waits", "limit_ms", "source"),
    [
        ({}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"1800"}, None, True, 1_798_000, "x-stainless-read-timeout"),
        ({READ: b"1800.0", WHOLE: b"5"}, None, True, 1_798_000, "x-stainless-read-timeout"),
        ({READ: b"10"}, None, True, 9_000, "x-stainless-read-timeout"),
        ({READ: b"10"}, None, False, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"1800"}, None, False, 1_798_000, "x-stainless-read-timeout"),
        ({READ: b"600"}, None, True, 598_000, "x-stainless-read-timeout"),
        ({WHOLE: b"1800"}, None, True, 1_798_000, "x-stainless-timeout"),
        ({WHOLE: b"0"}, None, True, 900, "x-stainless-timeout"),
        ({READ: b"99999"}, None, True, 3_600_000, "INFERQ_ROUTER_MAX_DEADLINE_MS"),
        ({READ: b"None"}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"inf"}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"-1"}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"0"}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({WHOLE: b"NOT_GIVEN"}, None, True, 600_000, "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"),
        ({READ: b"1800"}, 30.0, True, 30_000, "timeout in the request's body"),
        ({READ: b"1800", b"x-inferq-deadline-ms": b"50"}, 30.0, True, 50, "x-inferq-deadline-ms"),
        ({b"x-inferq-deadline-ms": b"4000000"}, None, True, 3_600_000, "INFERQ_ROUTER_MAX_DEADLINE_MS"),
    ],
)
def test_which_limit_counts(
    headers: dict[bytes, bytes], body_s: float | None, waits: bool, limit_ms: int, source: str
) -> None:
    """[C6] The caller's own limit, then its client's time-out (for streams and persisted answers only to lengthen),
    then the setting; the maximum bounds them all, and the error names the one that counts."""
    found = find_deadline(headers, body_s, 600_000, 3_600_000, waits=waits)
    assert found.limit_ms == limit_ms
    assert found.description.startswith(f"{limit_ms} ms (set by ")
    assert source in found.description


async def test_a_slow_plain_answer_has_as_long_as_the_sdk_waits() -> None:
    """[C6] The SDK's ``timeout`` alone lengthens the deadline: one job, one answer."""
    queue = FakeQueue("m")
    settings = {"default_deadline_ms": 200, "deadline_grace_ms": 0}
    async with served(queue, **settings) as running, running.openai(timeout=20, max_retries=2) as client:
        asking = asyncio.ensure_future(client.chat.completions.create(model="m", messages=MESSAGES))
        job = await queue.job()
        assert job.ttl_ms == 18_000
        await asyncio.sleep(0.5)  # past the default
        queue.answer(job, b'{"id": "x", "object": "chat.completion", "choices": []}')
        assert (await asking).id == "x"
    assert queue.enqueued.empty()


@pytest.mark.parametrize("timeout_s", [None, 3.0])
async def test_an_expired_request_is_not_retried(timeout_s: float | None) -> None:
    """[C6] The SDK gets the error before its own time-out, with the hint not to retry, and shows what set the limit."""
    queue = FakeQueue("m")
    settings = {"default_deadline_ms": 300, "deadline_grace_ms": 0}
    async with served(queue, **settings) as running, running.openai(timeout=timeout_s, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    limit = "x-stainless-read-timeout" if timeout_s else "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"
    assert raised.value.status_code == 504
    assert limit in raised.value.message
    assert raised.value.response.headers["x-should-retry"] == "false"
    await queue.job()
    assert queue.enqueued.empty()


@pytest.mark.parametrize(
    ("given", "gives_up_s"),
    [({READ: b"3"}, 3.0), ({WHOLE: b"3"}, 3.0), ({WHOLE: b"20"}, 20.0), ({READ: b"1800"}, 1800.0)],
)
def test_a_deadline_and_its_grace_end_before_the_client_times_out(given: dict[bytes, bytes], gives_up_s: float) -> None:
    """[H15] The client waits whole seconds, not a second less; other deadlines have no such end."""
    found = find_deadline(given, None, 600_000, 3_600_000, waits=True)
    assert found.limit_ms / 1000 + found.client_grace_s < gives_up_s - 0.1
    assert find_deadline(given, None, 600_000, 3_600_000, waits=False).client_grace_s == float("inf")
    assert find_deadline({}, None, 600_000, 3_600_000, waits=True).client_grace_s == float("inf")


async def test_a_silent_queue_is_an_error_before_the_client_times_out() -> None:
    """[H15] With the default grace, no Manager and no worker that answer: the SDK gets its limit as an error, and asks
    once."""
    queue = FakeQueue("m")
    async with served(queue) as running, running.openai(timeout=3.0, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    assert raised.value.status_code == 504
    assert "x-stainless-read-timeout" in raised.value.message
    await queue.job()
    assert queue.enqueued.empty()


async def test_every_expired_request_names_its_limit() -> None:
    """[C6] In the queue, while it ran, or while nobody serves the model."""
    queue = FakeQueue("m")
    async with router(queue, default_deadline_ms=5_000, pools=["idle"]) as app:
        for model in ("m", "idle"):
            answer = Client(app).post(CHAT | {"model": model})
            job = await queue.job()
            queue.mark(job, MarkerKind.EXPIRED, reason="its time ran out in the queue")
            await answer.done()
            assert "5000 ms (set by INFERQ_ROUTER_DEFAULT_DEADLINE_MS)" in answer.error["message"]
            assert (answer.status, answer.headers["x-should-retry"]) == (504, "false")
        assert "no worker serves idle" in answer.error["message"]


async def test_a_stream_is_not_cut_at_its_clients_read_timeout() -> None:
    """[C6] It limits silence, which keep-alive comments break; a stream may take longer."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT | {"stream": True}, headers={"x-stainless-read-timeout": "5"})
        job = await queue.job()
        assert job.ttl_ms == 600_000
        keyed = Client(app).post(CHAT, headers={"x-stainless-read-timeout": "5", "idempotency-key": "k"})
        assert (await queue.job()).ttl_ms == 600_000
        answer.client.gone.set()
        keyed.client.gone.set()
        await eventually(lambda: len(app.services.requests) == 0, "both are over")
