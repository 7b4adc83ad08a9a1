"""Attempts that are stopped: aborts, deadlines, Routers that are gone, workers that stop."""

from __future__ import annotations

import asyncio

from queue_schemas import (
    END,
    Outcome,
)
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain


async def test_an_abort_closes_the_engine_call_and_reports_nothing() -> None:
    """The queue has ended the job already: the connection closes, nothing is settled or released."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    job_lease = lease(stream=True)
    async with bench.running(job_lease):
        await eventually(lambda: bench.broker.published, "the stream has begun")
        bench.attempts.abort(job_lease.job.id, "cancelled by the client")
    assert bench.engine.left_early == 1
    assert not bench.broker.settled
    assert not bench.broker.released


async def test_an_abort_that_overtakes_its_claim_is_remembered() -> None:
    """The abort may be read before the claim's answer: the job is then not sent to the engine, but handed back, since a
    queue that lost its latest writes may mean a new job under its id. That one, which comes next, is run."""
    bench = Bench(plain(200))
    job_lease = lease()
    bench.attempts.abort(job_lease.job.id, "cancelled")
    await bench.run(job_lease)
    assert not bench.engine.calls
    assert not bench.broker.settled
    assert bench.broker.released == [("already aborted on this worker", False)]
    await bench.run(job_lease)
    assert len(bench.broker.settled) == 1


async def test_an_abort_before_the_first_step_of_its_task_is_clean() -> None:
    """A job aborted in the same breath in which it was started leaves no trace and frees its slot."""
    bench = Bench(plain(200))
    job_lease = lease()
    async with bench.running(job_lease):
        bench.attempts.abort(job_lease.job.id, "cancelled")
    assert bench.ended == [False]
    assert len(bench.attempts) == 0


async def test_a_job_whose_time_ran_out_is_answered_504() -> None:
    """The sweep stops it; the client is told, as an answer or, in a begun stream, as an event."""
    bench = Bench(Answer(200, SSE, [asyncio.Event()]))
    async with bench.running(lease(remaining_ms=1)):
        await eventually(lambda: bench.engine.calls, "the engine is asked")
        bench.attempts.stop_late(asyncio.get_running_loop().time() + 1)
    ((_, outcome, (frame,)),) = bench.broker.settled
    assert (outcome, frame.status) == (Outcome.EXPIRED, 504)
    begun = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    async with begun.running(lease(remaining_ms=1, stream=True)):
        await eventually(lambda: begun.broker.published, "the stream has begun")
        begun.attempts.stop_late(asyncio.get_running_loop().time() + 1)
    ((_, _, frames),) = begun.broker.settled
    assert b"deadline_exceeded" in frames[-1].data
    assert frames[-1].flags == END


async def test_a_router_that_is_gone_ends_its_streams() -> None:
    """Nobody listens: the engine call is closed and the queue told, without spending the attempt."""
    bench = Bench(Answer(200, SSE, [b"data: 1\n\n", asyncio.Event()]))
    job_lease = lease(stream=True)
    bench.broker.gone = {job_lease.job.reply_to}
    await bench.run(job_lease)
    assert bench.engine.left_early == 1
    assert bench.broker.released == [("nobody waits for the answer", False)]


async def test_jobs_are_handed_back_uncounted_when_the_worker_stops() -> None:
    """At the end of a drain running jobs go to others as if never started."""
    bench = Bench(Answer(200, SSE, [asyncio.Event()]))
    async with bench.running(lease(), lease()):
        await eventually(lambda: len(bench.engine.calls) == 2, "both run")
        bench.attempts.hand_back()
    assert bench.broker.released == [("its worker stops", False)] * 2


async def test_the_jobs_of_one_model_are_waited_for_and_then_handed_back() -> None:
    """Others run on, and count for nothing."""
    silent = Answer(200, SSE, [asyncio.Event()])
    bench, hurry = Bench(silent), asyncio.Event()
    leases = [lease(model="x"), lease(model="x"), lease(model="other")]
    async with bench.running(*leases):
        await eventually(lambda: len(bench.engine.calls) == 3, "all run")
        await bench.attempts.finish_model("unheard of", 60, hurry)
        waiting = asyncio.create_task(bench.attempts.finish_model("x", 60, hurry))
        await asyncio.sleep(0)
        bench.attempts.abort(leases[0].job.id, "cancelled")
        await eventually(lambda: len(bench.attempts) == 2, "one has ended")
        assert not waiting.done()
        bench.attempts.abort(leases[1].job.id, "cancelled")
        await asyncio.wait_for(waiting, 10)
        assert bench.broker.released == []
        async with asyncio.TaskGroup() as group:
            bench.attempts.start([lease(model="x")], group)
            await bench.attempts.finish_model("x", 0, hurry)
        assert bench.broker.released == [("its worker stops", False)]
        hurry.set()
        async with asyncio.TaskGroup() as group:
            bench.attempts.start([lease(model="x")], group)
            await bench.attempts.finish_model("x", 60, hurry)
        assert len(bench.broker.released) == 2
        assert len(bench.attempts) == 1
        bench.attempts.abort(leases[2].job.id, "cancelled")
