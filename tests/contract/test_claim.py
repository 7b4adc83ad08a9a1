"""Claiming: what a lease holds, repeats, dead entries, and who may claim at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker
from queue_schemas import (
    LANES,
    Control,
    ControlKind,
    Fenced,
    Lane,
    MarkerKind,
    Outcome,
    Pool,
    Settled,
    State,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, make_job

from .conftest import Listener


async def test_a_lease_says_all_an_attempt_needs(broker: Broker, worker: Puller) -> None:
    """The envelope as it was, epoch and attempt from 1, the time left and the time waited."""
    job = make_job(ttl_ms=60_000, traceparent="00-ab-cd-01", request_id="req-1", affinity="f00", cost_estimate=7)
    await broker.jobs.enqueue(job)
    await asyncio.sleep(0.02)
    lease = await worker.claim_one()
    assert lease.job == job
    assert (lease.epoch, lease.attempt) == (1, 1)
    assert lease.attempt_id
    assert 20 <= lease.waited_ms < 10_000
    assert 50_000 < lease.remaining_ms <= 60_000 - lease.waited_ms


async def test_two_workers_never_hold_one_job(broker: Broker) -> None:
    """Many workers claim at once; every job is leased to exactly one."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(60)))
    workers = [await Puller(broker).join() for _ in range(6)]
    claims = await asyncio.gather(*(worker.claim(7) for worker in workers for _ in range(2)))
    held = [lease.job.id for leases in claims for lease in leases]
    assert len(held) == len(set(held)) == 60


async def test_repeating_a_claim_gives_the_same_leases(broker: Broker, worker: Puller) -> None:
    """The same (session id, seq) again answers the same jobs under the same attempts, and claims nothing more."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(6)))
    pools = [(Pool(MODEL), [Lane.INTERACTIVE])]
    first = (await broker.workers.claim(0, worker.session_id, 7, 0, 3, pools)).leases
    again = (await broker.workers.claim(0, worker.session_id, 7, 0, 3, pools)).leases
    assert [(lease.job.id, lease.attempt_id, lease.epoch) for lease in again] == [
        (lease.job.id, lease.attempt_id, lease.epoch) for lease in first
    ]
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].leased == 3
    assert len((await broker.workers.claim(0, worker.session_id, 8, 3, 5, pools)).leases) == 3


async def test_a_repeated_claim_leaves_out_what_has_ended_since(broker: Broker, worker: Puller) -> None:
    """A job that was settled or cancelled in between is not leased a second time."""
    for _ in range(3):
        await broker.jobs.enqueue(make_job())
    pools = [(Pool(MODEL), [Lane.INTERACTIVE])]
    first = (await broker.workers.claim(0, worker.session_id, 1, 0, 3, pools)).leases
    await broker.attempts.settle(first[0], Outcome.DONE)
    await broker.jobs.cancel(first[1].job.id, "gone")
    again = (await broker.workers.claim(0, worker.session_id, 1, 0, 3, pools)).leases
    assert [lease.job.id for lease in again] == [first[2].job.id]


async def test_who_never_joined_is_fenced(broker: Broker) -> None:
    """Claiming and renewing need a join."""
    outsider = Puller(broker)
    await broker.jobs.enqueue(make_job())
    with pytest.raises(Fenced):
        await outsider.claim()
    with pytest.raises(Fenced):
        await broker.workers.renew(outsider.session_id)


async def test_a_job_whose_time_ran_out_is_not_started(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Past its deadline a job expires at the claim, even if no sweep came by, and its Router hears so."""
    job = make_job(ttl_ms=5, reply_to=listener.router)
    await broker.jobs.enqueue(job)
    await asyncio.sleep(0.02)
    assert await worker.claim() == []
    marker = await listener.marker()
    assert (marker.kind, marker.job_id) == (MarkerKind.EXPIRED, job.id)
    assert await broker.jobs.enqueue(job) is State.EXPIRED


async def test_a_job_that_nobody_waits_for_is_cancelled(broker: Broker, worker: Puller, listener: Listener) -> None:
    """With its Router's stream gone an unstored job is not run; others are."""
    orphan, kept = make_job(reply_to=listener.router), make_job()
    await broker.jobs.enqueue(orphan)
    await broker.jobs.enqueue(kept)
    await listener.leave()
    assert (await worker.claim_one()).job == kept
    assert await broker.jobs.enqueue(orphan) is State.CANCELLED


async def test_a_stored_job_runs_without_its_router(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Nobody needs to listen for a job whose answer is kept."""
    job = make_job(reply_to=listener.router, persisted=True, lane=Lane.BACKGROUND)
    await broker.jobs.enqueue(job)
    await listener.leave()
    assert (await worker.claim_one()).job == job


async def test_a_claim_passes_over_a_bounded_number_of_dead_entries(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """At most 64 dead entries are cleaned up by one call; the worker is told to claim again and loses nothing."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job(reply_to=listener.router)) for _ in range(150)))
    alive = make_job()
    await broker.jobs.enqueue(alive)
    await listener.leave()
    calls = 0
    while not (leases := await worker.claim()):
        calls += 1
        assert [message.kind for message in await worker.control_messages()] == [ControlKind.WAKE]
        assert calls < 5
    assert calls == 2
    assert leases[0].job == alive


@pytest.mark.parametrize("why", ["nobody waits for them", "this worker gave them up"])
async def test_a_job_that_waits_again_is_found_behind_many_that_are_not_for_this_worker(
    broker: Broker, worker: Puller, listener: Listener, why: str
) -> None:
    """However many there are, up to the 64 that one call passes over: an idle worker does not wait for the sweep."""
    for_nobody = why == "nobody waits for them"
    await asyncio.gather(*(broker.jobs.enqueue(make_job(reply_to=listener.router)) for _ in range(40)))
    last = make_job()
    await broker.jobs.enqueue(last)
    other = await Puller(broker).join()
    gave_up, released = await worker.claim(40), await other.claim_one()
    for lease in gave_up:
        await broker.attempts.release(lease, "the engine failed", counted=not for_nobody)
    await broker.attempts.release(released, "draining", counted=False)
    if for_nobody:
        await listener.leave()
    assert (await worker.claim_one()).job == last


async def test_an_empty_stream_and_its_tenant_are_forgotten(broker: Broker, worker: Puller, client: Any) -> None:
    """A drained queue leaves neither its stream nor its place among the tenants."""
    await broker.jobs.enqueue(make_job())
    await worker.claim_one()
    assert not await client.exists(ShardKeys(0).queue(MODEL, Lane.INTERACTIVE, 2, "acme"))
    assert not await client.exists(ShardKeys(0).active(MODEL, Lane.INTERACTIVE, 2))


async def test_a_worker_that_just_failed_a_job_lets_others_try(broker: Broker, worker: Puller) -> None:
    """For two seconds a counted release keeps the job from the worker that gave it up, not from others."""
    job = make_job()
    await broker.jobs.enqueue(job)
    await broker.attempts.release(await worker.claim_one(), "the engine failed", counted=True)
    assert await worker.claim() == []
    other = await Puller(broker).join()
    lease = await other.claim_one()
    assert (lease.job, lease.attempt, lease.epoch) == (job, 2, 2)


async def test_the_only_worker_gets_its_failed_job_back_in_the_end(broker: Broker, worker: Puller) -> None:
    """With nobody else there, the same worker is woken and tries again after the two seconds."""
    job = make_job()
    await broker.jobs.enqueue(job)
    await broker.attempts.release(await worker.claim_one(), "the engine failed", counted=True)
    async with asyncio.timeout(6):
        while not (leases := await worker.claim()):
            await broker.maintenance.expire()
            await worker.control_messages(block_ms=100)
    assert leases[0].job == job


async def test_a_claim_of_nothing_parks_and_gives_nothing(broker: Broker, worker: Puller) -> None:
    """A worker without pools, or asking for no job, gets an empty answer."""
    await broker.jobs.enqueue(make_job())
    assert await worker.claim(models=()) == []
    assert await worker.claim(n=0) == []
    assert len(await worker.claim(n=1)) == 1


async def test_attempts_have_ids_of_their_own(broker: Broker) -> None:
    """No two attempts of anything share an attempt id."""
    worker = await Puller(broker).join()
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(20)))
    ids = set()
    for _ in range(3):
        for lease in await worker.claim(20):
            ids.add(lease.attempt_id)
            assert await broker.attempts.release(lease, "draining", counted=False) is Settled.OK
    assert len(ids) == 60
    assert new_session_id("x") != new_session_id("x")


async def test_a_late_copy_of_an_older_claim_takes_nothing(broker: Broker, worker: Puller) -> None:
    """Bytes of a connection that was given up may arrive after newer claims: they must not lease a job to nobody."""
    assert await worker.claim(1) == []
    old = worker.seq
    assert await worker.claim(1) == []
    job = make_job()
    await broker.jobs.enqueue(job)
    late = await broker.workers.claim(0, worker.session_id, old, 0, 1, [(MODEL, LANES)])
    assert late.leases == ()
    assert [lease.job.id for lease in await worker.claim(1)] == [job.id]


async def test_a_claim_that_grows_large_ends_early_and_is_followed_by_another(broker: Broker, worker: Puller) -> None:
    """A reply is bounded in bytes, at least one job is always given, and the worker is told to claim again."""
    for _ in range(4):
        await broker.jobs.enqueue(make_job(body=b"x" * (5 << 20)))
    await worker.control_messages()
    assert len(await worker.claim(4)) == 2
    assert Control(ControlKind.WAKE) in await worker.control_messages()
    assert len(await worker.claim(4)) == 2


async def test_a_worker_is_avoided_for_as_long_as_it_says(broker: Broker, worker: Puller) -> None:
    """[C8] An engine named when it may be asked again: until then only other workers get the job."""
    other = Puller(broker)
    await broker.workers.join(other.session_id)
    await broker.jobs.enqueue(make_job())
    await broker.attempts.release(await worker.claim_one(), "the engine answered 503", counted=True, avoid_ms=60_000)
    assert await worker.claim() == []
    await broker.attempts.release(await other.claim_one(), "the engine answered 503", counted=True, avoid_ms=0)
    await asyncio.sleep(0.01)
    assert (await other.claim_one()).attempt == 3
