"""Reporting ends to a queue that is away for a while."""

from __future__ import annotations

import asyncio

from queue_schemas import (
    Lease,
)
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain


async def test_an_answer_is_settled_after_an_outage() -> None:
    """An answer that is there is not thrown away because Redis was away for a while."""
    bench = Bench(plain(200))
    bench.broker.failures = 1
    await bench.run(lease())
    assert len(bench.broker.settled) == 1


async def test_a_job_is_released_after_an_outage() -> None:
    """A lease is not kept by a live worker because Redis was away when it wanted to give it up."""
    bench = Bench(plain(503))
    bench.broker.failures = 1
    await bench.run(lease())
    assert bench.broker.released == [("the engine answered 503", True)]


async def test_an_outage_past_the_deadline_ends_the_attempt() -> None:
    """Nobody waits any more: the slot is free again, whether the queue was told or not."""
    for answer in (plain(200), plain(503)):
        bench = Bench(answer)
        bench.broker.failures = 100
        await bench.run(lease(remaining_ms=0))
        assert bench.broker.failures == 99
        assert len(bench.ended) == 1


async def test_a_released_job_may_come_back_before_the_release_is_answered() -> None:
    """Two attempts of one job live side by side for a moment: an abort reaches both, and both end by themselves."""
    bench = Bench(plain(503))
    first = lease()
    again = Lease(first.job, 2, "attempt-again", 2, 60_000, 5)
    async with asyncio.TaskGroup() as group:
        bench.broker.released_by.clear()
        bench.attempts.start([first], group)
        await eventually(lambda: bench.engine.calls, "the engine refused the first attempt")
        bench.engine.answer = Answer(200, SSE, [asyncio.Event()])
        bench.attempts.start([again], group)
        await eventually(lambda: len(bench.engine.calls) == 2, "the second attempt runs")
        bench.broker.released_by.set()
        await eventually(lambda: len(bench.ended) == 1, "the first attempt is over")
        assert len(bench.attempts) == 1
        bench.attempts.abort(first.job.id, "cancelled")
        await asyncio.wait_for(bench.attempts.idle(), 10)
    assert bench.ended == [True, False]
    assert bench.engine.left_early == 1
