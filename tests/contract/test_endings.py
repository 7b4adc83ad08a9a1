"""How jobs end without an answer: cancelled, expired, dead; and what their Router and worker hear."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker
from queue_schemas import (
    Control,
    ControlKind,
    Job,
    Lane,
    Marker,
    MarkerKind,
    Outcome,
    Settled,
    State,
    new_job_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, make_job

from .conftest import Listener


async def test_cancelling_a_waiting_job_removes_it_unrun(broker: Broker, worker: Puller, listener: Listener) -> None:
    """It leaves the queue at once, and its Router hears why."""
    job, other = make_job(reply_to=listener.router), make_job()
    await broker.jobs.enqueue(job)
    await broker.jobs.enqueue(other)
    assert await broker.jobs.cancel(job.id, "the client went away") is State.QUEUED
    marker = await listener.marker()
    assert (marker.kind, marker.job_id, marker.reason) == (MarkerKind.CANCELLED, job.id, "the client went away")
    assert [lease.job for lease in await worker.claim(5)] == [other]


async def test_cancelling_a_running_job_tells_its_worker(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Its worker is told to abort, so that the engine's slot is freed."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    assert await broker.jobs.cancel(job.id, "the client went away") is State.LEASED
    assert await worker.control_messages() == [Control(ControlKind.ABORT, job.id, "the client went away")]
    await listener.expect_marker(MarkerKind.CANCELLED)
    assert await broker.stats.depths() == {}


async def test_cancelling_a_job_that_waits_again(broker: Broker, worker: Puller) -> None:
    """A job on the retry stream is cancelled like any waiting one."""
    job = make_job()
    await broker.jobs.enqueue(job)
    await broker.attempts.release(await worker.claim_one(), "draining", counted=False)
    assert await broker.jobs.cancel(job.id, "the client went away") is State.QUEUED
    assert await worker.claim() == []
    assert await broker.stats.depths() == {}


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_cancelling_what_has_ended_changes_nothing(
    broker: Broker, worker: Puller, listener: Listener, outcome: Outcome
) -> None:
    """A job ends once: the cancel that comes too late is answered with how it ended."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    await broker.attempts.settle(await worker.claim_one(), outcome)
    assert await broker.jobs.cancel(job.id, "too late") is State(outcome)
    assert await broker.jobs.enqueue(job) is State(outcome)
    assert await listener.received() == []


async def test_cancelling_twice_tells_once(broker: Broker, worker: Puller, listener: Listener) -> None:
    """A repeated cancel sends no second marker and no second abort."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    for _ in range(3):
        await broker.jobs.cancel(job.id, "the client went away")
    assert len(await worker.control_messages()) == 1
    assert len(await listener.received()) == 1


async def test_the_tombstone_of_an_unknown_cancel_passes(broker: Broker, client: Any) -> None:
    """Cancelling ids that never existed leaves only what expires."""
    job_id = new_job_id(0)
    await broker.jobs.cancel(job_id, "never existed")
    assert 0 < await client.pttl(ShardKeys(0).job(job_id)) <= 60_000


async def test_a_waiting_job_expires(broker: Broker, worker: Puller, listener: Listener) -> None:
    """The sweep ends a waiting job at its deadline, in order of deadlines, and leaves those with time."""
    jobs = [make_job(reply_to=listener.router, ttl_ms=ttl) for ttl in (10, 20, 60_000)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    await asyncio.sleep(0.04)
    assert (await broker.maintenance.expire()).expired == 2
    assert [(news.kind, news.job_id) for news in await listener.received() if isinstance(news, Marker)] == [
        (MarkerKind.EXPIRED, jobs[0].id),
        (MarkerKind.EXPIRED, jobs[1].id),
    ]
    assert [lease.job for lease in await worker.claim(5)] == jobs[2:]


async def test_a_running_job_expires(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Its worker is told to abort and its Router that time ran out."""
    job = make_job(reply_to=listener.router, ttl_ms=400)
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    await asyncio.sleep(lease.remaining_ms / 1000 + 0.005)
    assert (await broker.maintenance.expire()).expired == 1
    (abort,) = await worker.control_messages()
    assert (abort.kind, abort.job_id) == (ControlKind.ABORT, job.id)
    await listener.expect_marker(MarkerKind.EXPIRED)
    assert (await broker.maintenance.expire()).expired == 0


async def test_a_job_that_waits_again_keeps_its_deadline(broker: Broker, worker: Puller) -> None:
    """Losing an attempt does not buy time."""
    job = make_job(ttl_ms=400)
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    await broker.attempts.release(lease, "draining", counted=False)
    await asyncio.sleep(lease.remaining_ms / 1000 + 0.005)
    assert await worker.claim() == []
    assert await broker.jobs.enqueue(job) is State.EXPIRED


async def test_many_deadlines_at_once_are_swept_in_steps(broker: Broker) -> None:
    """Hundreds of jobs whose time ran out together all end, though one step takes a bounded number."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job(ttl_ms=1)) for _ in range(600)))
    await asyncio.sleep(0.01)
    expired = 0
    for _ in range(20):
        expired += (await broker.maintenance.expire()).expired
    assert expired == 600
    assert await broker.stats.depths() == {}


async def test_an_abandoned_job_is_cancelled_when_its_worker_dies(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """With nobody waiting for the answer any more, a lost attempt is not run again."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    await listener.leave()
    assert (await broker.maintenance.reclaim(worker.session_id)).cancelled == 1
    assert await broker.jobs.enqueue(job) is State.CANCELLED


async def test_an_abandoned_job_is_cancelled_when_it_is_handed_back(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """The same for a release; the worker's call itself succeeds, and nothing is created for the Router that is gone."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    await listener.leave()
    assert await broker.attempts.release(lease, "draining", counted=False) is Settled.OK
    assert await broker.jobs.enqueue(job) is State.CANCELLED
    assert await listener.received() == []


async def test_a_settle_for_a_router_that_is_gone_creates_nothing(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """The answer is dropped; the stream of a dead Router does not come back to life."""
    await broker.jobs.enqueue(make_job(reply_to=listener.router))
    lease = await worker.claim_one()
    await listener.leave()
    assert await broker.attempts.settle(lease, Outcome.DONE, b"\x90") is Settled.OK
    assert not await client.exists(ShardKeys(0).reply(listener.router))


async def test_a_dead_letter_holds_the_cause_and_the_whole_job(
    broker: Broker, worker: Puller, client: Any, listener: Listener
) -> None:
    """What an operator needs: why, where, how often, and the envelope to run it again."""
    job = make_job(max_attempts=1, reply_to=listener.router, lane=Lane.BATCH)
    await broker.jobs.enqueue(job)
    await broker.attempts.release(await worker.claim_one(), "the engine answered 500", counted=True)
    ((entry, letter),) = await client.xrange(ShardKeys(0).dead)
    assert letter[b"cause"] == b"the engine answered 500"
    assert letter[b"worker"].decode() == worker.session_id
    assert (letter[b"attempts"], letter[b"lane"]) == (b"1", b"batch")
    assert Job.unpack(await client.get(ShardKeys(0).dead_request(entry.decode()))) == job
    marker = await listener.marker()
    assert (marker.kind, marker.reason) == (MarkerKind.DEAD, "the engine answered 500")


async def test_totals_count_every_ending(broker: Broker, worker: Puller) -> None:
    """Enqueued equals live plus each terminal state: what operators and the conservation check read."""
    jobs = [make_job(max_attempts=1) for _ in range(6)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    leases = await worker.claim(4)
    await broker.attempts.settle(leases[0], Outcome.DONE)
    await broker.attempts.settle(leases[1], Outcome.FAILED)
    await broker.attempts.release(leases[2], "broken", counted=True)
    await broker.jobs.cancel(jobs[4].id, "gone")
    totals = {
        event: count for (pool, lane, event), count in (await broker.stats.job_counts()).events.items() if pool == MODEL
    }
    assert totals == {"enqueued": 6, "done": 1, "failed": 1, "dead": 1, "cancelled": 1}
    depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
    assert (depth.waiting, depth.leased) == (1, 1)


async def test_the_earliest_deadline_of_what_waits_is_told(broker: Broker, worker: Puller) -> None:
    """Of each tenant's first job, in every lane of its own; what runs has none that scaling could keep."""
    for tenant, ttl_ms in (("a", 60_000), ("b", 30_000), ("b", 5_000)):
        await broker.jobs.enqueue(make_job(tenant=tenant, ttl_ms=ttl_ms))
    await broker.jobs.enqueue(make_job(tenant="a", ttl_ms=90_000, lane=Lane.BATCH))
    await broker.maintenance.expire()
    lanes = (await broker.stats.depths())[MODEL]
    assert 25_000 < (lanes[Lane.INTERACTIVE].deadline_ms or 0) <= 30_000
    assert 85_000 < (lanes[Lane.BATCH].deadline_ms or 0) <= 90_000
    await worker.claim(4)
    assert {depth.deadline_ms for depth in (await broker.stats.depths())[MODEL].values()} == {None}


async def test_what_was_stopped_is_counted_by_what_it_was_doing(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """Cancelled and expired jobs, waiting and running, and those whose Router is gone, each have their own count."""
    late = [make_job(ttl_ms=300) for _ in range(3)]
    for job in late:
        await broker.jobs.enqueue(job)
    swept, settled = await worker.claim(2)
    assert await broker.attempts.settle(settled, Outcome.EXPIRED) is Settled.OK
    assert await broker.attempts.settle(settled, Outcome.EXPIRED) is Settled.DUPLICATE
    assert await broker.jobs.enqueue(settled.job) is State.EXPIRED
    running, waiting, orphan, orphan_running = (make_job(), make_job(), *(_job_for(listener) for _ in range(2)))
    await broker.jobs.cancel(late[2].id, "gone")
    for job in (running, orphan_running, waiting, orphan):
        await broker.jobs.enqueue(job)
    _, released = await worker.claim(2)
    for job in (running, waiting):
        await broker.jobs.cancel(job.id, "gone")
    await listener.leave()
    await broker.attempts.release(released, "draining", counted=False)
    assert await worker.claim(1) == []
    await asyncio.sleep(0.32)
    assert (await broker.maintenance.expire()).expired == 1
    assert await broker.jobs.cancel(swept.job.id, "gone") is State.EXPIRED
    await broker.jobs.enqueue(make_job(ttl_ms=5))
    await asyncio.sleep(0.02)
    await broker.maintenance.expire()
    counts = await broker.stats.job_counts()
    assert {event: count for (pool, lane, event), count in counts.stopped.items()} == {
        "cancelled/waiting": 2,
        "cancelled/running": 1,
        "cancelled/router_gone": 2,
        "expired/running": 2,
        "expired/waiting": 1,
    }
    assert {event: count for (_, _, event), count in counts.events.items()} == {
        "enqueued": 8,
        "cancelled": 5,
        "expired": 3,
    }


def _job_for(listener: Listener) -> Job:
    return make_job(reply_to=listener.router)
