"""Attempts of lower lanes yield to interactive jobs that find no free slot; their jobs go on behind what they said."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from broker import Broker
from queue_schemas import ControlKind, Job, Lane, Lease, Outcome, Settled, State
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, answer_frame, make_job

from .conftest import Listener

KEYS = ShardKeys(0)


def line(yields: int = 2, **fields: Any) -> Job:
    """A job that may yield."""
    return make_job(lane=Lane.BATCH, yields=yields, **fields)


async def leased(broker: Broker, worker: Puller, *jobs: Job) -> list[Lease]:
    """The attempts of these jobs, which fill all slots of a worker, in order."""
    leases = []
    for job in jobs:
        await broker.jobs.enqueue(job)
        leases.append(await worker.claim_one())
        await asyncio.sleep(0.002)  # each begins in a millisecond of its own
    return leases


async def asked(worker: Puller) -> list[str]:
    """The attempts that a worker was asked to have yield since the last call."""
    return [one.attempt_id for one in await worker.control_messages() if one.kind is ControlKind.YIELD]


@pytest.mark.parametrize("lane", [Lane.BATCH, Lane.BACKGROUND])
async def test_the_attempt_that_began_last_yields(broker: Broker, worker: Puller, lane: Lane) -> None:
    """One for each interactive job that waits, and each attempt once."""
    first, second = await leased(broker, worker, *(make_job(lane=lane, yields=2) for _ in range(2)))
    for _ in range(3):
        await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [second.attempt_id, first.attempt_id]


async def test_only_interactive_jobs_without_a_slot_have_others_yield(broker: Broker, worker: Puller) -> None:
    """Not a job of a lower lane, nor one that is handed over, or for which a parked worker is woken."""
    (held,) = await leased(broker, worker, line())
    await broker.jobs.enqueue(line())
    await broker.jobs.enqueue(make_job(lane=Lane.BACKGROUND))
    idle = await Puller(broker).join()
    await idle.claim(1, lanes=[Lane.INTERACTIVE], offer=1)
    await broker.jobs.enqueue(make_job())
    sleepy = await Puller(broker).join()
    await sleepy.claim(1, lanes=[Lane.INTERACTIVE])
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == []
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [held.attempt_id]


@pytest.mark.parametrize("job", [line(0), make_job(yields=2)], ids=["may not", "interactive"])
async def test_what_may_not_yield_is_not_asked(broker: Broker, worker: Puller, client: Any, job: Job) -> None:
    """Nor is anything written down of it."""
    await leased(broker, worker, job)
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == []
    assert not await client.exists(KEYS.yieldable(MODEL))


async def test_lower_lanes_keep_their_part(broker: Broker, worker: Puller) -> None:
    """With eight jobs running, the last one of a lower lane stays: that is what claims give it."""
    *_, first, second = await leased(broker, worker, *(make_job() for _ in range(6)), line(), line())
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [second.attempt_id]
    await broker.attempts.release_yielded(second, "it yields")
    await worker.claim_one()
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == []
    assert await broker.attempts.settle(first, Outcome.DONE) is Settled.OK


async def test_a_job_goes_on_behind_what_it_said(broker: Broker, worker: Puller, listener: Listener) -> None:
    """On any worker, this one included, ahead of new work, uncounted, and as often as it may."""
    job = line(reply_to=listener.router, max_attempts=1)
    (first,) = await leased(broker, worker, job)
    await broker.jobs.enqueue(line())
    following = replace(job, prefix="Once", yields=1)
    assert await broker.attempts.release_yielded(first, "it yields", following) is Settled.OK
    assert (await listener.marker()).epoch == 2
    second = await worker.claim_one()
    assert (second.job, second.attempt, second.epoch) == (following, 1, 2)
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [second.attempt_id]
    last = replace(job, prefix="Once upon", yields=0)
    assert await broker.attempts.release_yielded(second, "it yields", last) is Settled.OK
    interactive, third = await worker.claim_one(), await worker.claim_one()
    assert interactive.job.lane is Lane.INTERACTIVE
    assert third.job == last
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == []
    assert await broker.attempts.settle(third, Outcome.DONE, answer_frame(third)) is Settled.OK
    counts = await broker.stats.job_counts()
    assert counts.events[MODEL, Lane.BATCH, "yielded"] == 2


async def test_it_spends_no_more_budget_than_it_has(broker: Broker, worker: Puller, client: Any) -> None:
    """The bytes of what it said count while it lives, and no longer."""
    job = line()
    (lease,) = await leased(broker, worker, job)
    following = replace(job, prefix="x" * 1_000, yields=1)
    await broker.attempts.release_yielded(lease, "it yields", following)
    assert int(await client.hget(KEYS.budget, "t:acme:bytes")) == len(following.pack())
    await broker.attempts.settle(await worker.claim_one(), Outcome.DONE)
    assert not await client.exists(KEYS.budget)
    assert not await client.exists(KEYS.yieldable(MODEL))


async def test_a_repeated_release_changes_nothing(broker: Broker, worker: Puller) -> None:
    """Its reply was lost: the job is behind the first one's text, and one yield is spent."""
    job = line()
    (lease,) = await leased(broker, worker, job)
    following = replace(job, prefix="Once", yields=1)
    assert await broker.attempts.release_yielded(lease, "it yields", following) is Settled.OK
    late = replace(job, prefix="Once upon", yields=1)
    assert await broker.attempts.release_yielded(lease, "it yields", late) is Settled.DUPLICATE
    assert (await worker.claim_one()).job == following


async def test_a_yield_comes_too_late_for_what_has_ended(broker: Broker, worker: Puller) -> None:
    """A job that was cancelled, or whose worker was lost, meanwhile is not put on the queue again."""
    job, other = line(), line()
    lease, lost = await leased(broker, worker, job, other)
    await broker.jobs.cancel(job.id, "it is not wanted")
    assert await broker.attempts.release_yielded(lease, "it yields", replace(job, prefix="Once")) is Settled.FENCED
    await broker.maintenance.reclaim(worker.session_id)
    assert await broker.attempts.release_yielded(lost, "it yields", replace(other, prefix="Once")) is Settled.FENCED
    assert await broker.jobs.enqueue(job) is State.CANCELLED
    again = await (await Puller(broker).join()).claim_one()
    assert (again.job, again.attempt) == (other, 2)


async def test_an_attempt_that_ended_is_not_asked(broker: Broker, worker: Puller) -> None:
    """Settled, handed back or lost: nothing of it is left among those that may be asked."""
    done, back, cancelled, lost = await leased(broker, worker, *(line() for _ in range(4)))
    await broker.attempts.settle(done, Outcome.DONE)
    await broker.attempts.release(back, "it drains", counted=False)
    await broker.jobs.cancel(cancelled.job.id, "it is not wanted")
    other = await Puller(broker).join()
    kept = await other.claim_one()
    await broker.maintenance.reclaim(worker.session_id)
    await broker.jobs.enqueue(make_job())
    await broker.jobs.enqueue(make_job())
    assert await asked(other) == [kept.attempt_id]
    assert lost.job.id != kept.job.id


async def test_a_suspect_is_left_alone(broker: Broker, worker: Puller) -> None:
    """Its next crash would be blamed on less than it did."""
    (lease,) = await leased(broker, worker, line())
    await broker.attempts.report_crash([lease], "the engine crashed")
    other = await Puller(broker).join()
    assert (await other.claim_one()).suspect
    await broker.jobs.enqueue(make_job())
    assert await asked(other) == []


async def test_one_that_declines_makes_room_for_another(broker: Broker, worker: Puller) -> None:
    """The next interactive job does not wait for it; it is asked last, or not at all."""
    first, second, third = await leased(broker, worker, *(line() for _ in range(3)))
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [third.attempt_id]
    await broker.attempts.decline_to_yield(third, for_now=True)
    await broker.jobs.enqueue(make_job())
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [second.attempt_id, first.attempt_id]
    await broker.attempts.decline_to_yield(first, for_now=False)
    await broker.jobs.enqueue(make_job())
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == [third.attempt_id]


async def test_the_sweep_asks_again(broker: Broker, worker: Puller, client: Any) -> None:
    """A job that still waits, because a worker declined or nothing could yield when it came, is helped within a second
    or two."""
    await broker.jobs.enqueue(make_job())
    await broker.jobs.enqueue(line())
    lease = await worker.claim_one(lanes=[Lane.BATCH])
    await broker.maintenance.expire()
    assert await asked(worker) == [lease.attempt_id]
    await broker.maintenance.expire()
    assert await asked(worker) == []
    ((_, score),) = await client.zrange(KEYS.yieldable(MODEL), 0, -1, withscores=True)
    await client.zadd(KEYS.yieldable(MODEL), {lease.job.id: score + 2_000})
    await broker.maintenance.expire()
    assert await asked(worker) == [lease.attempt_id]


EU = {"region": "eu", "remote_after_ms": 60_000}
"""An interactive job that is first for workers of its region."""


async def regional(broker: Broker, region: str, *, handed_over: bool = False) -> tuple[Puller, Lease]:
    """A worker of a region, and the line that it runs."""
    worker = await Puller(broker, region=region).join()
    if not handed_over:
        return worker, (await leased(broker, worker, line()))[0]
    await worker.claim(1, offer=1)
    await broker.jobs.enqueue(line())
    (lease,) = await worker.handed()
    return worker, lease


@pytest.mark.parametrize("handed_over", [False, True], ids=["claimed", "handed over"])
async def test_a_job_of_a_region_has_an_attempt_there_yield(broker: Broker, client: Any, handed_over: bool) -> None:
    """One at a worker that may run the job, though others began later; a job of no region asks all."""
    here, yielding = await regional(broker, "eu", handed_over=handed_over)
    (there, remote), (nowhere, _) = await regional(broker, "us"), await regional(broker, "")
    job = make_job(**EU)
    await broker.jobs.enqueue(job)
    assert (await asked(here), await asked(there), await asked(nowhere)) == ([yielding.attempt_id], [], [])
    await broker.jobs.enqueue(make_job(**EU))
    assert await asked(there) == []
    await broker.attempts.release_yielded(yielding, "it yields", replace(yielding.job, prefix="Once", yields=1))
    assert (await here.claim_one()).job.id == job.id
    await there.control_messages()
    await broker.attempts.settle(remote, Outcome.DONE)
    assert not await client.exists(KEYS.yieldable(MODEL, "eu"), KEYS.yieldable(MODEL, "us"))
    assert await client.zcard(KEYS.yieldable(MODEL)) == 1


@pytest.mark.parametrize("handed_over", [False, True], ids=["claimed", "handed over"])
async def test_who_takes_no_others_yields_to_its_region_alone(broker: Broker, client: Any, handed_over: bool) -> None:
    """A slot that becomes free there is none for a job of no region."""
    worker = await Puller(broker, region="eu", others=False).join()
    await worker.claim(1, offer=int(handed_over))
    await broker.jobs.enqueue(replace(line(), region="eu", remote_after_ms=60_000))
    (lease,) = await worker.handed() if handed_over else await worker.claim(1)
    await broker.jobs.enqueue(make_job())
    assert await asked(worker) == []
    await broker.jobs.enqueue(make_job(**EU))
    assert await asked(worker) == [lease.attempt_id]
    await broker.attempts.settle(lease, Outcome.DONE)
    assert not await client.exists(KEYS.yieldable(MODEL), KEYS.yieldable(MODEL, "eu"))


async def test_a_line_that_goes_on_in_another_region_is_asked_there(broker: Broker) -> None:
    """By where it runs, not by where it ran."""
    here, yielding = await regional(broker, "eu")
    there = await Puller(broker, region="us").join()
    following = replace(yielding.job, prefix="Once", yields=1)
    await broker.attempts.release_yielded(yielding, "it yields", following)
    again = await there.claim_one()
    await broker.jobs.enqueue(make_job(**EU))
    await broker.jobs.enqueue(make_job(**EU | {"region": "us"}))
    assert (await asked(here), await asked(there)) == ([], [again.attempt_id])


async def test_one_that_declines_in_a_region_makes_room_for_another_there(broker: Broker) -> None:
    worker = await Puller(broker, region="eu").join()
    first, second, third = await leased(broker, worker, *(line() for _ in range(3)))
    await broker.jobs.enqueue(make_job(**EU))
    await broker.attempts.decline_to_yield(third, for_now=True, region="eu")
    await broker.jobs.enqueue(make_job(**EU))
    await broker.attempts.decline_to_yield(second, for_now=False, region="eu")
    for _ in range(3):
        await broker.jobs.enqueue(make_job(**EU))
    assert await asked(worker) == [one.attempt_id for one in (third, second, first, third)]


async def test_the_sweep_asks_in_a_region_and_where_its_jobs_are_opened_to_all(broker: Broker) -> None:
    """A job that found nothing to yield when it came is helped by its region's workers as soon as one runs a line, and
    by any once it may run anywhere."""
    waits_long, waits_briefly = make_job(**EU), make_job(region="us", remote_after_ms=30)
    for job in (waits_long, waits_briefly, line(), line()):
        await broker.jobs.enqueue(job)
    here, anywhere = await Puller(broker, region="eu").join(), await Puller(broker).join()
    local, other = await here.claim_one(lanes=[Lane.BATCH]), await anywhere.claim_one(lanes=[Lane.BATCH])
    await broker.maintenance.expire()
    assert (await asked(here), await asked(anywhere)) == ([local.attempt_id], [])
    await broker.attempts.release_yielded(local, "it yields")
    await asyncio.sleep(0.04)
    await broker.maintenance.expire()
    assert (await asked(here), await asked(anywhere)) == ([], [other.attempt_id])
