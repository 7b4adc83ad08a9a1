"""Engines that crash, and connections that break."""

from __future__ import annotations

import asyncio

from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease
from worker.engines import EngineGone


async def test_a_crash_is_tried_again_on_the_only_engine() -> None:
    """[C8] A lost connection is no answer: the engine is started again, and asked again."""
    bench = Bench(EngineGone("it crashed"))
    bench.elsewhere = False
    await bench.run(lease())
    assert len(bench.broker.crashes) == 1
    assert bench.broker.settled == []


async def test_all_that_ran_on_a_crashed_engine_is_ended_together() -> None:
    """One call names every job, so that the queue can tell suspects from neighbours; it is sent until answered."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", EngineGone("the engine crashed")]))
    bench.broker.failures = 1
    leases = [lease(stream=True) for _ in range(5)]
    await bench.run(*leases)
    (crash,) = bench.broker.crashes
    assert {lease.attempt_id for lease in crash} == {lease.attempt_id for lease in leases}
    assert bench.ended == [True] * 5
    assert bench.broker.released == []


async def test_one_broken_connection_is_no_crash() -> None:
    """While others go on beside it, the engine lives: the job is released alone."""
    go_on = asyncio.Event()
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", go_on, b"data: [DONE]\n\n"]))
    async with asyncio.TaskGroup() as group:
        bench.attempts.start([lease(stream=True)], group)
        flush = group.create_task(bench.frame_batcher.run())
        await eventually(lambda: len(bench.broker.published) == 1, "one stream has begun")
        bench.engine.answer = Answer(200, SSE, [EngineGone("the connection broke")])
        bench.attempts.start([lease(stream=True)], group)
        await eventually(lambda: bench.broker.released, "the other one is released")
        go_on.set()
        await bench.attempts.idle()
        flush.cancel()
    assert bench.broker.released == [("the connection broke", True)]
    assert bench.broker.crashes == []
    assert len(bench.broker.settled) == 1
