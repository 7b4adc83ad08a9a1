"""Lost streams: they wait for their Router, which says what was delivered, and go on from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from broker import Broker, Reclaimed
from queue_schemas import Job, Lane, Marker, MarkerKind, Outcome, Pool, Settled, State
from queue_schemas.keys import ShardKeys
from tests.contract.conftest import Listener
from tests.support.queue import MODEL, Puller, answer_frame, change_record, make_job

KEYS = ShardKeys(0)


def make_stream(listener: Listener, **fields: Any) -> Job:
    """A stream that its Router can continue."""
    return make_job(reply_to=listener.router, stream=True, on_loss="continue", **fields)


async def lose(broker: Broker, worker: Puller, job: Job) -> None:
    """Enqueue and claim a job, then lose its worker."""
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    assert (await broker.maintenance.reclaim(worker.session_id)).lost == 1


async def test_a_lost_stream_waits_for_its_router(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Nobody is given it before the Router has said where it goes on."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    assert await listener.marker() == Marker(MarkerKind.LOST, job.id, 2, "its worker was lost")
    other = await Puller(broker).join()
    assert await other.claim() == []
    assert await broker.jobs.resume(replace(job, prefix="Once upon"), 2) is State.QUEUED
    lease = await other.claim_one()
    assert (lease.job.prefix, lease.epoch, lease.attempt) == ("Once upon", 2, 2)


@pytest.mark.parametrize("counted", [True, False])
async def test_a_stream_that_its_worker_gives_back_waits_too(
    broker: Broker, worker: Puller, listener: Listener, counted: bool
) -> None:
    """However its attempt ended, what was delivered must not be delivered again; a repeated call changes nothing."""
    job = make_stream(listener)
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    assert await broker.attempts.release(lease, "draining", counted=counted) is Settled.OK
    assert await broker.attempts.release(lease, "draining", counted=counted) is Settled.DUPLICATE
    await listener.expect_marker(MarkerKind.LOST)
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.FENCED


@pytest.mark.parametrize(
    "fields",
    [{"on_loss": "restart"}, {"on_loss": "fail"}, {"stream": False}, {"persisted": True}],
    ids=["restart", "fail", "plain", "persisted"],
)
async def test_other_jobs_are_run_again_at_once(
    broker: Broker, worker: Puller, listener: Listener, fields: dict[str, Any]
) -> None:
    """Only unstored streams that are to be continued wait for their Router."""
    await broker.jobs.enqueue(replace(make_stream(listener), **fields))
    await worker.claim_one()
    assert await broker.maintenance.reclaim(worker.session_id) == Reclaimed(requeued=1)
    await listener.expect_marker(MarkerKind.REQUEUED)


async def test_resume_is_idempotent(broker: Broker, worker: Puller, listener: Listener) -> None:
    """A repeated resume puts nothing on the queue twice, and changes no attempt that runs."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    for _ in range(2):
        assert await broker.jobs.resume(replace(job, prefix="Once"), 2) is State.QUEUED
    assert (await broker.stats.depths())[Pool(MODEL)][Lane.INTERACTIVE].waiting == 1
    other = await Puller(broker).join()
    lease = await other.claim_one()
    assert await broker.jobs.resume(replace(job, prefix="Once upon a time"), 2) is State.LEASED
    assert await other.claim() == []
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    assert await broker.jobs.resume(job, 2) is State.DONE


async def test_a_resume_for_an_earlier_loss_is_void(broker: Broker, worker: Puller, listener: Listener) -> None:
    """It would have the next attempt repeat what was delivered since."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    await broker.jobs.resume(replace(job, prefix="Once"), 2)
    second = await Puller(broker).join()
    await second.claim_one()
    await broker.maintenance.reclaim(second.session_id)
    assert await broker.jobs.resume(replace(job, prefix="Once"), 2) is State.LOST
    third = await Puller(broker).join()
    assert await third.claim() == []
    assert await broker.jobs.resume(replace(job, prefix="Once upon"), 3) is State.QUEUED
    assert (await third.claim_one()).job.prefix == "Once upon"


async def test_resume_of_an_unknown_job(broker: Broker, listener: Listener) -> None:
    """The Router is told, and writes nothing."""
    assert await broker.jobs.resume(make_stream(listener), 1) is None
    assert await broker.stats.depths() == {}


async def test_a_lost_stream_that_nobody_waits_for_is_cancelled(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """Its Router is gone: the sweep ends it, and its budget is free."""
    await lose(broker, worker, make_stream(listener))
    await client.zadd(KEYS.lost, dict.fromkeys(await client.zrange(KEYS.lost, 0, -1), 0))
    await listener.leave()
    await broker.maintenance.expire()
    assert (await broker.stats.job_counts()).events[(Pool(MODEL), Lane.INTERACTIVE, "cancelled")] == 1
    assert not await client.exists(KEYS.lost, KEYS.budget, KEYS.deadlines)


async def test_a_router_that_did_not_answer_is_asked_again(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """A marker may be lost on its way, or a Router may be paused; it is not asked at every sweep."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    await listener.expect_marker(MarkerKind.LOST)
    await broker.maintenance.expire()
    assert await listener.received() == []
    await client.zadd(KEYS.lost, {job.id: 0})
    await broker.maintenance.expire()
    again = await listener.marker()
    assert (again.kind, again.epoch) == (MarkerKind.LOST, 2)
    await broker.maintenance.expire()
    assert await listener.received() == []
    assert await broker.jobs.resume(job, 2) is State.QUEUED


@pytest.mark.parametrize("how", ["cancel", "expire"])
async def test_a_lost_stream_can_end(broker: Broker, worker: Puller, listener: Listener, client: Any, how: str) -> None:
    """Cancelled or expired while it waits for its Router, it leaves nothing behind."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    await listener.expect_marker(MarkerKind.LOST)
    if how == "cancel":
        assert await broker.jobs.cancel(job.id, "its client went away") is State.LOST
        await listener.expect_marker(MarkerKind.CANCELLED)
    else:
        await change_record(client, KEYS.job(job.id), deadline=1)
        await client.zadd(KEYS.deadlines, {job.id: 1})
        assert (await broker.maintenance.expire()).expired == 1
        await listener.expect_marker(MarkerKind.EXPIRED)
    assert not await client.exists(KEYS.lost, KEYS.budget, KEYS.deadlines)
    assert await broker.jobs.resume(job, 2) is (State.CANCELLED if how == "cancel" else State.EXPIRED)


async def test_attempts_of_a_continued_stream_are_bounded(broker: Broker, listener: Listener) -> None:
    """Its last attempt lost, it is dead, and not asked for."""
    job = make_stream(listener, max_attempts=2)
    await broker.jobs.enqueue(job)
    for epoch in (2, 3):
        worker = await Puller(broker).join()
        await worker.claim_one()
        taken = await broker.maintenance.reclaim(worker.session_id)
        if epoch == 2:
            await listener.expect_marker(MarkerKind.LOST)
            await broker.jobs.resume(job, 2)
    assert taken == Reclaimed(dead=1)
    await listener.expect_marker(MarkerKind.DEAD)


async def test_a_longer_envelope_counts_in_the_budget_and_is_given_back(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """What is taken for the prefix is returned with the rest."""
    job = make_stream(listener)
    await lose(broker, worker, job)
    before = int(await client.hget(KEYS.budget, "t:acme:bytes"))
    resumed = replace(job, prefix="x" * 5_000)
    await broker.jobs.resume(resumed, 2)
    grown = len(resumed.pack()) - len(job.pack())
    assert int(await client.hget(KEYS.budget, "t:acme:bytes")) == before + grown
    lease = await (await Puller(broker).join()).claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    assert not await client.exists(KEYS.budget)


async def test_a_resumed_stream_wakes_a_parked_worker(broker: Broker, worker: Puller, listener: Listener) -> None:
    """It does not wait for the sweep."""
    idle = await Puller(broker).join()
    job = make_stream(listener)
    await lose(broker, worker, job)
    assert await idle.claim() == []
    assert await broker.stats.depths() == {}
    await broker.jobs.resume(job, 2)
    assert [message.kind.value for message in await idle.control_messages(200)] == ["wake"]
    assert (await broker.stats.depths())[Pool(MODEL)][Lane.INTERACTIVE].waiting == 1
