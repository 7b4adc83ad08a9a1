"""Another run of Redis without its latest writes: what a worker runs and what the server says of it are made the same.

What was lost is made by hand: a copy of the records before is put in place of what stands there after.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker import Broker, JobStatus
from queue_schemas import (
    Fenced,
    Frame,
    Job,
    Lane,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    Settled,
    State,
    new_job_id,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, answer_frame, make_job
from tests.support.waiting import eventually

from .conftest import Connect, Listener

KEYS = ShardKeys(0)
NEXT_RUN = 1 << 20
"""Where the epochs of a server's second run begin."""


@asynccontextmanager
async def lost(client: Any) -> AsyncIterator[None]:
    """Redis loses every write made within the block."""
    before: dict[bytes, bytes] = {key: await client.dump(key) for key in await client.keys("iq:*")}
    yield
    await client.flushall()
    for key, value in before.items():
        await client.restore(key, 0, value)


async def counts(broker: Broker) -> tuple[int, int]:
    """Waiting and leased jobs of the model."""
    depth = (await broker.stats.depths()).get(MODEL, {}).get(Lane.INTERACTIVE)
    return (depth.waiting, depth.leased) if depth else (0, 0)


async def reconcile(worker: Puller, *leases: Lease) -> set[str]:
    """What a worker does that finds its server back."""
    return await worker.broker.workers.reconcile_leases(0, worker.session_id, worker.seq, leases)


@pytest.fixture
def job(listener: Listener) -> Job:
    return make_job(reply_to=listener.router)


async def test_what_is_held_stays_held(broker: Broker, worker: Puller, job: Job) -> None:
    """A server that lost nothing agrees with its worker: no lease is touched."""
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    for _ in range(2):
        assert await reconcile(worker, lease) == set()
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_an_answer_that_was_lost_is_made_again(
    broker: Broker, client: Any, worker: Puller, listener: Listener, job: Job
) -> None:
    """The server lost that the job was settled: its worker, which runs it no more, gives it back, and it runs anew."""
    await broker.jobs.enqueue(job)
    first = await worker.claim_one()
    async with lost(client):
        assert await broker.attempts.settle(first, Outcome.DONE, answer_frame(first)) is Settled.OK
    assert await counts(broker) == (0, 1)
    for _ in range(2):
        assert await reconcile(worker) == set()
        assert await counts(broker) == (1, 0)
    again = await worker.claim_one()
    assert (again.job, again.epoch, again.attempt) == (job, NEXT_RUN, 1)
    assert await broker.attempts.settle(first, Outcome.DONE, answer_frame(first)) is Settled.FENCED
    assert await broker.attempts.settle(again, Outcome.DONE, answer_frame(again)) is Settled.OK
    requeued = [news for news in await listener.received() if isinstance(news, Marker)]
    assert [(marker.kind, marker.job_id, marker.epoch) for marker in requeued] == [
        (MarkerKind.REQUEUED, job.id, NEXT_RUN)
    ]


async def test_an_attempt_that_was_lost_is_nobodys(broker: Broker, client: Any, worker: Puller, job: Job) -> None:
    """The server lost a claim, and gives the job out again under the same epoch: the worker hears that its attempt does
    not count, and it can settle nothing."""
    await broker.jobs.enqueue(job)
    async with lost(client):
        stale = await worker.claim_one()
    other = await Puller(broker).join()
    lease = await other.claim_one()
    assert lease.epoch == stale.epoch
    assert lease.attempt_id != stale.attempt_id
    assert await reconcile(worker, stale) == {stale.attempt_id}
    assert await reconcile(other, lease) == set()
    assert await broker.attempts.settle(stale, Outcome.DONE, answer_frame(stale)) is Settled.FENCED
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK


async def test_a_job_that_was_lost_is_nobodys(broker: Broker, client: Any, worker: Puller, job: Job) -> None:
    """The server never heard of the job that the worker runs."""
    async with lost(client):
        await broker.jobs.enqueue(job)
        stale = await worker.claim_one()
    assert await broker.jobs.raise_epoch(job.id, 0) is None
    assert await reconcile(worker, stale) == {stale.attempt_id}
    assert await broker.attempts.settle(stale, Outcome.DONE) is Settled.GONE


async def test_an_epoch_given_out_twice_is_left_behind(broker: Broker, client: Any, worker: Puller, job: Job) -> None:
    """The server lost a release and the claim that followed: the job it gives out next has an epoch above both."""
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    other = await Puller(broker).join()
    async with lost(client):
        assert await broker.attempts.release(lease, "the engine was busy", counted=False) is Settled.OK
        stale = await other.claim_one()
        assert stale.epoch == lease.epoch + 1
    await reconcile(worker)
    again = await worker.claim_one()
    assert again.epoch == NEXT_RUN
    assert await broker.attempts.settle(stale, Outcome.DONE) is Settled.FENCED
    assert await broker.attempts.settle(again, Outcome.DONE) is Settled.OK


async def test_a_late_copy_of_a_comparison_takes_nothing(broker: Broker, worker: Puller, job: Job) -> None:
    """Sent before the claim and carried out behind it, it does not know the lease, and leaves it alone."""
    await broker.jobs.enqueue(job)
    seq = worker.seq
    lease = await worker.claim_one()
    assert await broker.workers.reconcile_leases(0, worker.session_id, seq, ()) == set()
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_a_claim_whose_answer_is_awaited_gives_nothing_that_was_given_back(
    broker: Broker, worker: Puller, job: Job
) -> None:
    """The lease of an unanswered claim is handed back by the comparison; the repeated claim does not give it again."""
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    await reconcile(worker)
    worker.seq -= 1
    assert await worker.claim() == []
    assert await counts(broker) == (1, 0)


async def test_the_dead_hold_nothing(broker: Broker, worker: Puller) -> None:
    """An session id that was declared dead hears it."""
    await broker.maintenance.reclaim(worker.session_id)
    with pytest.raises(Fenced):
        await reconcile(worker)


async def test_a_waiting_job_is_raised_above_all_that_was_heard(broker: Broker, worker: Puller, job: Job) -> None:
    """Its next attempt is told from every one before; where it stands in the queue stays, and so does a running one."""
    later = make_job(reply_to=job.reply_to)
    await broker.jobs.enqueue(job)
    await broker.jobs.enqueue(later)
    for _ in range(2):
        assert await broker.jobs.raise_epoch(job.id, 0) == JobStatus(State.QUEUED, NEXT_RUN, "")
    assert await broker.jobs.raise_epoch(job.id, NEXT_RUN + 3) == JobStatus(State.QUEUED, 2 * NEXT_RUN, "")
    lease = await worker.claim_one()
    assert (lease.job, lease.epoch) == (job, 2 * NEXT_RUN)
    assert await broker.jobs.raise_epoch(job.id, 5 * NEXT_RUN) == JobStatus(State.LEASED, lease.epoch, lease.attempt_id)
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK
    assert await broker.jobs.raise_epoch(job.id, 0) == JobStatus(State.DONE, lease.epoch, "")


async def test_a_wake_is_heard_on_a_clock_that_is_behind(broker: Broker, client: Any, worker: Puller) -> None:
    """The new server's clock is behind and its control stream was cut: what it says next is not taken for read."""
    last = f"{(await client.time())[0] * 1000 + 3_600_000}-0"
    worker._read_to = last
    await worker.control_messages()
    await reconcile(worker)
    await worker.claim()
    await broker.jobs.enqueue(make_job())
    assert [control.kind.value for control in await worker.control_messages()] == ["wake"]


async def test_a_control_stream_that_was_cut_further_breaks_no_comparison(
    broker: Broker, client: Any, worker: Puller, job: Job
) -> None:
    """The server failed over twice: its stream is empty, though ids beyond what the worker read were given out. What it
    held is given back whole, counters included."""
    await broker.jobs.enqueue(job)
    await worker.claim_one()
    await worker.control_messages()
    control = KEYS.control(worker.session_id)
    await client.xadd(control, {"k": "hello"}, id=f"{(await client.time())[0] * 1000 + 3_600_000}-0")
    await client.xtrim(control, maxlen=0)
    assert await reconcile(worker) == set()
    assert await counts(broker) == (1, 0)
    assert (await worker.claim_one()).job == job


async def test_replies_are_heard_on_a_clock_that_is_behind(
    connect: Connect, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of a Router's stream, read further than the new run of its server knows; and the Router is told."""
    runs = ["one"]

    async def run_id(*_: object) -> str:
        return runs[-1]

    monkeypatch.setattr("broker.operations.replies.read_run_id", run_id)
    monkeypatch.setattr("broker.operations.replies._EXTEND_EVERY_S", 0.02)
    monkeypatch.setattr("broker.operations.replies._BLOCK_MS", 50)
    broker = await connect()
    router = new_session_id("router")
    key = KEYS.reply(router)
    heard: list[Frame | Marker] = []
    told: list[int] = []
    reading = asyncio.create_task(broker.replies.read(router, heard.extend, told.append))
    async with asyncio.timeout(20):
        await broker.replies.ready.wait()
        first, second = (Marker(MarkerKind.DEAD, new_job_id(0), 2, word) for word in ("one", "two"))
        hour_ahead = (await client.time())[0] * 1000 + 3_600_000
        await client.xadd(key, {"m": first.pack()}, id=f"{hour_ahead}-0")
        await eventually(lambda: first in heard, "the first marker is read")
        await client.xadd("iq:{0}:older", {"o": "open"})
        await client.rename("iq:{0}:older", key)
        runs.append("two")
        await eventually(lambda: told, "the new run is noticed")
        await client.xadd(key, {"m": second.pack()}, nomkstream=True)
        await eventually(lambda: second in heard, "the second marker is read")
    assert told == [0]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
