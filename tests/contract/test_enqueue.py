"""Putting jobs on the queue: idempotent, bounded, never half done."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker, Budgets
from queue_schemas import Lane, Outcome, OverCapacity, State
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, make_job

from .conftest import Connect


async def test_a_job_waits_in_the_stream_of_its_pool_lane_band_and_tenant(broker: Broker, client: Any) -> None:
    """The documented key is a stream whose XLEN is the depth, for any tool."""
    jobs = [make_job(lane=Lane.BATCH, band=1, tenant="a:b{c}") for _ in range(3)]
    for job in jobs:
        assert await broker.jobs.enqueue(job) is State.QUEUED
    key = ShardKeys(0).queue(MODEL, Lane.BATCH, 1, "a:b{c}")
    assert await client.xlen(key) == 3
    assert [fields[b"id"].decode() for _, fields in await client.xrange(key)] == [job.id for job in jobs]


async def test_enqueueing_twice_queues_once(broker: Broker, worker: Puller) -> None:
    """A repeated enqueue answers the state and adds nothing."""
    job = make_job()
    assert [await broker.jobs.enqueue(job), await broker.jobs.enqueue(job)] == [State.QUEUED, State.QUEUED]
    assert [lease.job for lease in await worker.claim(5)] == [job]
    assert (await broker.stats.job_counts()).events[(MODEL, Lane.INTERACTIVE, "enqueued")] == 1


async def test_enqueueing_twice_at_once_queues_once(broker: Broker, worker: Puller) -> None:
    """The same job twice in one batch is one job."""
    job = make_job()
    assert set(await asyncio.gather(*(broker.jobs.enqueue(job) for _ in range(4)))) == {State.QUEUED}
    assert len(await worker.claim(5)) == 1


async def test_a_running_or_finished_job_is_not_queued_again(broker: Broker, worker: Puller) -> None:
    """A late repeat of an enqueue finds the lease, then the tombstone, and leaves them alone."""
    job = make_job()
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    assert await broker.jobs.enqueue(job) is State.LEASED
    await broker.attempts.settle(lease, Outcome.DONE)
    assert await broker.jobs.enqueue(job) is State.DONE
    assert await worker.claim() == []


async def test_a_cancel_that_comes_first_makes_the_enqueue_void(broker: Broker, worker: Puller) -> None:
    """Cancelling an unknown job leaves a tombstone, so the enqueue that was overtaken never runs."""
    job = make_job()
    assert await broker.jobs.cancel(job.id, "the client went away") is None
    assert await broker.jobs.enqueue(job) is State.CANCELLED
    assert await worker.claim() == []
    assert await broker.stats.depths() == {}


async def test_a_tombstone_lasts_longer_than_any_retry(broker: Broker, worker: Puller, client: Any) -> None:
    """What a finished job leaves keeps 60 s, and retries end within 30: then nothing is left."""
    job = make_job()
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE)
    assert 30_000 < await client.pttl(ShardKeys(0).job(job.id)) <= 60_000
    assert await client.get(ShardKeys(0).job(job.id)) == f"done 1 {lease.attempt_id}".encode()


@pytest.mark.parametrize(
    ("budgets", "sentence"),
    [
        (Budgets(tenant_jobs=2), "your account has too many requests"),
        (Budgets(tenant_bytes=900), "your account has too many bytes"),
        (Budgets(pool_jobs=2), f"too many requests wait for model {MODEL}"),
        (Budgets(pool_bytes=900), f"too many bytes of requests wait for model {MODEL}"),
    ],
)
async def test_a_budget_refuses_and_takes_again_when_jobs_have_ended(
    connect: Connect, budgets: Budgets, sentence: str
) -> None:
    """Past a budget an enqueue is refused with what to do; room that ended jobs give back can be used again."""
    broker = await connect(budgets=budgets)
    worker = await Puller(broker).join()
    for _ in range(2):
        await broker.jobs.enqueue(make_job())
    refused = make_job()
    with pytest.raises(OverCapacity, match=sentence) as refusal:
        await broker.jobs.enqueue(refused)
    assert refusal.value.retry_after_s
    await broker.attempts.settle(await worker.claim_one(), Outcome.DONE)
    assert await broker.jobs.enqueue(refused) is State.QUEUED


async def test_a_full_tenant_does_not_refuse_others(connect: Connect) -> None:
    """Budgets are each tenant's own, also inside one batch."""
    broker = await connect(budgets=Budgets(tenant_jobs=1))
    jobs = [make_job(tenant="greedy"), make_job(tenant="greedy"), make_job(tenant="modest")]
    first, second, third = await asyncio.gather(*map(broker.jobs.enqueue, jobs), return_exceptions=True)
    assert (first, third) == (State.QUEUED, State.QUEUED)
    assert isinstance(second, OverCapacity)


async def test_a_known_job_is_not_measured_against_the_budget_again(connect: Connect) -> None:
    """Repeating an enqueue works at the limit: it adds nothing."""
    broker = await connect(budgets=Budgets(tenant_jobs=1))
    job = make_job()
    assert [await broker.jobs.enqueue(job), await broker.jobs.enqueue(job)] == [State.QUEUED, State.QUEUED]


@pytest.mark.parametrize("ending", ["done", "failed", "cancelled_waiting", "cancelled_running", "expired", "dead"])
async def test_budgets_return_to_zero(broker: Broker, worker: Puller, client: Any, ending: str) -> None:
    """However a job ends, its budget comes back to the last byte."""
    job = make_job(max_attempts=1, ttl_ms=1 if ending == "expired" else 60_000)
    await broker.jobs.enqueue(job)
    match ending:
        case "done" | "failed":
            await broker.attempts.settle(await worker.claim_one(), Outcome(ending))
        case "cancelled_waiting":
            await broker.jobs.cancel(job.id, "no longer wanted")
        case "cancelled_running":
            await worker.claim_one()
            await broker.jobs.cancel(job.id, "no longer wanted")
        case "dead":
            await broker.attempts.release(await worker.claim_one(), "the engine failed", counted=True)
        case "expired":
            await asyncio.sleep(0.005)
            await broker.maintenance.expire()
    left = await client.hgetall(ShardKeys(0).budget)
    assert {name for name in left if not name.startswith(b"dead:")} == set()


async def test_a_large_body_travels_unchanged(broker: Broker, worker: Puller) -> None:
    """A body of some megabytes of arbitrary bytes arrives as it was."""
    job = make_job(body=bytes(range(256)) * 16_384, content_type="multipart/form-data; boundary=x")
    await broker.jobs.enqueue(job)
    assert (await worker.claim_one()).job == job


async def test_a_thousand_concurrent_enqueues_share_round_trips(broker: Broker) -> None:
    """Batching: far fewer round trips than jobs."""
    before = broker.round_trips
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(1_000)))
    assert broker.round_trips - before < 50
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == 1_000
