"""Running one attempt: errors of engines, and whether a job is tried again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from queue_schemas import (
    BadRequest,
    EngineFailed,
    Lane,
    Outcome,
)
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain


@pytest.mark.parametrize("status", [300, 301, 304, 307, 308])
async def test_a_redirect_is_no_answer(status: int) -> None:
    """[H44] A client never gets the redirect of an engine, whose Location it could not use: the job is tried elsewhere,
    and fails at last with the engine's fault."""
    bench = Bench(plain(status, b""))
    await bench.run(lease())
    assert bench.broker.released[0][1] is True
    assert not bench.broker.settled
    bench = Bench(plain(status, b""))
    await bench.run(lease(attempt=3))
    ((_, outcome, frames),) = bench.broker.settled
    assert outcome is Outcome.FAILED
    assert frames[0].status == 502


async def test_an_engine_error_is_released_until_the_last_attempt() -> None:
    """A 5xx spends the attempt; the last attempt gives the client the engine's own answer."""
    bench = Bench(plain(503, b"busy"))
    await bench.run(lease(attempt=1, max_attempts=2))
    assert bench.broker.released == [("the engine answered 503", True)]
    assert bench.ended == [True]
    await bench.run(lease(attempt=2, max_attempts=2))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status, frame.data) == (Outcome.FAILED, 503, b"busy")


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_with_nowhere_else_to_go_an_engine_error_is_the_answer_at_once(status: int, stream: bool) -> None:
    """[C8] No other worker serves the model: asking the same engine again multiplies its load and the client's wait."""
    bench = Bench(Answer(status, SSE if stream else "application/json", [b"busy"]))
    bench.elsewhere = False
    await bench.run(lease(stream=stream))
    assert bench.broker.released == []
    ((_, outcome, frames),) = bench.broker.settled
    assert (outcome, frames[0].status, b"".join(frame.data for frame in frames)) == (Outcome.FAILED, status, b"busy")


@pytest.mark.parametrize("fields", [{"lane": Lane.BATCH}, {"lane": Lane.BACKGROUND}, {"persisted": True}])
async def test_background_work_is_retried_on_the_only_engine(fields: dict[str, Any]) -> None:
    """[C8] A line of a batch, a background job, an answer that is kept: no client repeats it."""
    bench = Bench(plain(500))
    bench.elsewhere = False
    await bench.run(lease(**fields))
    assert bench.broker.released == [("the engine answered 500", True)]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_an_engine_that_says_when_to_come_back_is_not_asked_before(elsewhere: bool) -> None:
    """[C8] A 503 with ``Retry-After`` waits as said, within the deadline; another worker may take the job meanwhile."""
    answer = plain(503, b"busy")
    answer.retry_after_s = 7.0
    bench = Bench(answer)
    bench.elsewhere = elsewhere
    await bench.run(lease(remaining_ms=60_000))
    assert bench.broker.released == [("the engine answered 503", True)]
    assert (bench.broker.avoided_ms, bench.waits_s) == (7_000, [7.0])
    await bench.run(lease(remaining_ms=5_000))
    if elsewhere:
        assert bench.broker.avoided_ms == 2_000
    else:
        ((_, outcome, (frame,)),) = bench.broker.settled
        assert (outcome, frame.status) == (Outcome.FAILED, 503)
    last = Bench(answer)
    await last.run(lease(attempt=3, max_attempts=3))
    assert len(last.broker.settled) == 1


@pytest.mark.parametrize(
    "answer", [plain(500), Answer(500, SSE, [b"busy"]), EngineFailed("refused")], ids=["plain", "stream", "none"]
)
async def test_a_client_is_told_not_to_retry_what_was_retried_already(answer: Answer | Exception) -> None:
    """[C8] SDKs obey ``x-should-retry``: else their three tries would become nine. After one attempt it is theirs."""
    told = []
    for attempt, attempts in ((1, 1), (3, 3)):
        bench = Bench(answer)
        await bench.run(lease(attempt, max_attempts=attempts, headers={}))
        told.append(bench.broker.settled[0][2][0].headers.get("x-should-retry"))
    assert told == [None, "false"]


async def test_no_connection_is_released_and_a_502_at_last() -> None:
    """Without any answer the last attempt ends in an error object that says what happened."""
    bench = Bench(EngineFailed("refused"))
    await bench.run(lease(attempt=1, max_attempts=2))
    assert bench.broker.released == [("refused", True)]
    await bench.run(lease(attempt=2, max_attempts=2))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 502)
    assert json.loads(frame.data)["error"]["code"] == "engine_failed"


async def test_a_request_no_engine_would_get_is_answered_400_at_once() -> None:
    """The client is told on the first attempt; nothing is tried again."""
    bench = Bench(BadRequest("its content type cannot be sent"))
    await bench.run(lease(attempt=1, max_attempts=3))
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.FAILED, 400)
    assert json.loads(frame.data)["error"]["code"] == "invalid_request"
    assert not bench.broker.released


async def test_a_job_that_meets_a_bug_of_ours_ends_alone() -> None:
    """An unforeseen exception spends the job's attempt; its neighbours and the worker go on."""
    bench = Bench(ValueError("unforeseen"))
    await bench.run(lease())
    assert bench.broker.released == [("the worker failed on it (ValueError)", True)]
