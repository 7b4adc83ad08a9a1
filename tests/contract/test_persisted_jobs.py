"""Persisted jobs: retrievable however they end, listed, forgotten with all their bytes, and their ends told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from broker import Broker, Budgets
from queue_schemas import (
    END,
    HEAD,
    BadMessage,
    BadRequest,
    Enqueued,
    Frame,
    Job,
    JobMetadata,
    Lane,
    Lease,
    MarkerKind,
    Outcome,
    OverCapacity,
    PersistedJob,
    PersistOptions,
    Settled,
    State,
    Tenant,
    new_job_id,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from tests.contract.conftest import Connect, Listener
from tests.contract.rewriting import Rewrite, rewritten
from tests.support.queue import MODEL, Puller, answer_frame, make_job

KEYS = ShardKeys(0)
ACME = Tenant("acme")
MEMO = JobMetadata(
    path="/v1/chat/completions", stream=True, on_loss="continue", choices=2, request_id="req_1", note=b"mine"
)
DAY_MS = 24 * 3600 * 1000
LISTED = PersistOptions(DAY_MS, MEMO, background=True, topic="response")


def background(**fields: Any) -> Job:
    """A persisted job that nobody waits for."""
    defaults: dict[str, Any] = {"persisted": True, "lane": Lane.BACKGROUND, "stream": True}
    return make_job(**(defaults | fields))


def piece(lease: Lease, seq: int, data: bytes) -> bytes:
    """A packed frame of a stream that goes on."""
    head = (200, "text/event-stream") if seq == 0 else (0, "")
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, HEAD if seq == 0 else 0, data, *head).pack()


async def told(broker: Broker, job: Job) -> PersistedJob:
    found = await broker.persisted_jobs.get(job.id)
    assert found is not None
    return found


async def ended_as(broker: Broker, worker: Puller, job: Job, ending: State) -> None:
    """Bring a queued job to its end, after it said something, if it is not answered."""
    lease = await worker.claim_one()
    assert lease.job.id == job.id
    if ending in (State.DONE, State.FAILED):
        assert await broker.attempts.settle(lease, Outcome(ending.value), answer_frame(lease)) is Settled.OK
        return
    await broker.attempts.append(lease, piece(lease, 0, b"half"))
    if ending is State.CANCELLED:
        await broker.jobs.cancel(job.id, "its tenant wanted that")
    elif ending is State.EXPIRED:
        await asyncio.sleep(0.12)
        assert (await broker.maintenance.expire()).expired == 1
    else:
        await broker.attempts.release(lease, "the engine broke", counted=True)


def lasting(ending: State) -> dict[str, Any]:
    """Fields of a job that is to end so."""
    return {"max_attempts": 1, "ttl_ms": 100 if ending is State.EXPIRED else 60_000}


async def test_a_live_job_is_reported(broker: Broker, worker: Puller) -> None:
    """Whose it is, when it came and began, what its Router noted; the job metadata is passed on as it is."""
    job = background()
    assert await broker.jobs.enqueue_persisted(job, LISTED) == Enqueued(job.id, State.QUEUED)
    waiting = await told(broker, job)
    assert (waiting.tenant, waiting.model, waiting.lane, waiting.state) == (ACME, MODEL, Lane.BACKGROUND, State.QUEUED)
    assert (waiting.metadata, waiting.topic, waiting.background) == (MEMO, "response", True)
    assert (waiting.started_ms, waiting.ended_ms, waiting.expires_ms, waiting.attempts) == (None, None, None, 0)
    assert waiting.created_ms + job.ttl_ms == waiting.deadline_ms
    lease = await worker.claim_one()
    running = await told(broker, job)
    assert (running.state, running.attempts) == (State.LEASED, 1)
    assert running.started_ms is not None
    assert running.created_ms <= running.started_ms <= running.now_ms
    await broker.attempts.release(lease, "its worker leaves", counted=False)
    await worker.claim_one()
    assert (await told(broker, job)).started_ms == running.started_ms


@pytest.mark.parametrize("ending", [State.DONE, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED])
async def test_a_listed_job_is_kept_however_it_ends(broker: Broker, worker: Puller, client: Any, ending: State) -> None:
    """Its state, cause and what it said stay for the keep time, counted among its tenant's bytes; then nothing is
    left, and its end was told once."""
    job = background(**lasting(ending))
    await broker.jobs.enqueue_persisted(job, replace(LISTED, retention_ms=80))
    await ended_as(broker, worker, job, ending)
    kept = await told(broker, job)
    assert (kept.state, kept.metadata, kept.tenant, kept.attempts, kept.lane) == (
        ending,
        MEMO,
        ACME,
        1,
        Lane.BACKGROUND,
    )
    assert kept.ended_ms is not None
    assert kept.expires_ms == kept.ended_ms + 80
    assert bool(kept.cause) == (ending not in (State.DONE, State.FAILED))
    page = await broker.output.read(job.id)
    assert page is not None
    assert (page.state, page.over, page.cause) == (ending, True, kept.cause)
    assert len(page.frames) == 1
    assert int(await client.hget(KEYS.budget, "t:acme:persisted")) == kept.persisted_bytes
    assert kept.persisted_bytes == 1_024 + len(MEMO.pack()) + len(page.frames[0].pack())
    assert [job.id for job in (await broker.persisted_jobs.page(ACME))[0]] == [job.id]
    (notice,) = await broker.persisted_jobs.read_finished()
    assert (notice.job_id, notice.tenant, notice.state, notice.topic) == (job.id, ACME, ending, "response")
    assert await broker.persisted_jobs.acknowledge_finished([notice.id]) == 1
    assert await broker.persisted_jobs.read_finished() == []

    await asyncio.sleep(0.1)
    assert (await broker.maintenance.expire()).forgotten == 1
    assert await broker.persisted_jobs.get(job.id) is None
    for key in (KEYS.out(job.id), KEYS.listed("acme"), KEYS.persisted, KEYS.listeners(job.id)):
        assert not await client.exists(key), key
    left = await client.hgetall(KEYS.budget)
    assert set(left) <= ({b"dead:bytes"} if ending is State.DEAD else set())


async def test_only_an_answer_keeps_its_key(broker: Broker) -> None:
    """A listed job that was cancelled is still told of, and the same request under its key is another job."""
    job = background(idempotency_key="order-17")
    await broker.jobs.enqueue_persisted(job, LISTED)
    again = replace(job, id=new_job_id(0))
    assert (await broker.jobs.enqueue_persisted(again, LISTED)).job_id == job.id
    await broker.jobs.cancel(job.id, "its tenant wanted that")
    assert (await broker.jobs.enqueue_persisted(again, LISTED)).job_id == again.id
    assert (await told(broker, job)).state is State.CANCELLED
    assert {one.id for one in (await broker.persisted_jobs.page(ACME))[0]} == {again.id, job.id}


async def test_what_is_not_listed_is_not_kept_without_an_answer(broker: Broker, client: Any) -> None:
    """A stream that a client may resume leaves nothing once it was cancelled, but is told of while it lives."""
    job = background(lane=Lane.INTERACTIVE)
    await broker.jobs.enqueue_persisted(job, PersistOptions(1_000, JobMetadata(resumable=True)))
    assert (await told(broker, job)).metadata.resumable
    assert (await broker.persisted_jobs.page(ACME))[0] == []
    await broker.jobs.cancel(job.id, "its client left")
    assert await broker.persisted_jobs.get(job.id) is None
    assert not await client.exists(KEYS.budget)
    assert await broker.persisted_jobs.read_finished() == []


@pytest.mark.parametrize("state", ["queued", "leased", "done", "cancelled"])
async def test_a_job_is_forgotten_on_demand(
    broker: Broker, worker: Puller, listener: Listener, client: Any, state: str
) -> None:
    """Whatever it does: it ends, who listens is told, every byte is given back, and late words of it are refused."""
    job = background()
    await broker.jobs.enqueue_persisted(job, LISTED, listener.router)
    lease = await worker.claim_one() if state in ("leased", "done") else None
    if lease and state == "done":
        await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    elif lease:
        await broker.attempts.append(lease, piece(lease, 0, b"half"))
    elif state == "cancelled":
        await broker.jobs.cancel(job.id, "before")
    await listener.received()
    assert await broker.persisted_jobs.delete(job.id, "deleted") is State(state)
    assert await broker.persisted_jobs.delete(job.id, "deleted") is None
    assert await broker.persisted_jobs.get(job.id) is None
    assert (await broker.persisted_jobs.page(ACME))[0] == []
    if state in ("queued", "leased"):
        await listener.expect_marker(MarkerKind.CANCELLED)
    if lease:
        late = await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
        assert late is (Settled.DUPLICATE if state == "done" else Settled.FENCED)
    for key in (KEYS.out(job.id), KEYS.listed("acme"), KEYS.persisted, KEYS.budget, KEYS.listeners(job.id)):
        assert not await client.exists(key), key
    assert 0 < await client.pttl(KEYS.job(job.id)) <= 60_000
    assert (await broker.jobs.enqueue_persisted(job, LISTED)).state in (State.CANCELLED, State.DONE)
    assert len(await broker.persisted_jobs.read_finished()) == 1


async def test_only_persisted_jobs_are_reported(broker: Broker) -> None:
    """An ordinary job, an unknown id, one of a shard that is not there, one that is none."""
    ordinary = make_job()
    await broker.jobs.enqueue(ordinary)
    for job_id in (ordinary.id, new_job_id(0), new_job_id(7), "job", "0-" + "x" * 32, "../../x"):
        assert await broker.persisted_jobs.get(job_id) is None
        assert await broker.persisted_jobs.delete(job_id, "deleted") is None
    assert (await broker.jobs.cancel(ordinary.id, "it is still there")) is State.QUEUED


async def test_jobs_are_listed_newest_first_in_pages(connect: Connect) -> None:
    """Every job of the tenant once, in every page size, on several shards, also those of the same millisecond, and
    none of others nor those that are stored for a key alone."""
    broker = await connect(shards=3)
    jobs = [background(model="abcd"[number % 4], shards=3) for number in range(30)]
    await asyncio.gather(*(broker.jobs.enqueue_persisted(job, LISTED) for job in jobs))
    await broker.jobs.enqueue_persisted(background(tenant="rival", shards=3), LISTED)
    await broker.jobs.enqueue_persisted(background(shards=3), listener=new_session_id("nobody"))
    for size in (1, 7, 29, 30, 100):
        seen: list[PersistedJob] = []
        after, more = "", True
        while more:
            page, after = await broker.persisted_jobs.page(ACME, after=after, limit=size)
            assert 0 < len(page) <= size
            seen += page
            more = bool(after)
        assert {job.id for job in seen} == {job.id for job in jobs}
        order = [(job.created_ms, job.id) for job in seen]
        assert order == sorted(set(order), reverse=True)
    with pytest.raises(BadRequest, match="leave out after"):
        await broker.persisted_jobs.page(Tenant("rival"), after=jobs[0].id)


async def test_large_notes_make_a_list_of_several_calls(broker: Broker) -> None:
    """No call tells of more than some megabytes; the page is whole all the same."""
    large = replace(LISTED, metadata=replace(MEMO, note=b"x" * 250_000))
    jobs = [background() for _ in range(12)]
    for job in jobs:
        await broker.jobs.enqueue_persisted(job, large)
    before = broker.round_trips
    page, more = await broker.persisted_jobs.page(ACME, limit=20)
    assert {kept.id for kept in page} == {job.id for job in jobs}
    assert all(len(kept.metadata.note) == 250_000 for kept in page)
    assert more == ""
    assert broker.round_trips - before >= 3


async def test_a_list_is_filtered_and_cleared(broker: Broker, client: Any) -> None:
    """By state, however many of others stand in between; places whose jobs are gone are cleared away."""
    jobs = [background() for _ in range(600)]
    await asyncio.gather(*(broker.jobs.enqueue_persisted(job, LISTED) for job in jobs))
    oldest = (await client.zrange(KEYS.listed("acme"), 0, 0))[0].decode()[16:]
    await broker.jobs.cancel(oldest, "one of many")
    page, after = await broker.persisted_jobs.page(ACME, limit=5, states=[State.CANCELLED, State.EXPIRED])
    assert ([job.id for job in page], after) == ([oldest], "")
    await client.delete(*(KEYS.job(job.id) for job in jobs[:300]))
    page, after = await broker.persisted_jobs.page(ACME, limit=5)
    assert len(page) == 5
    while after:
        _, after = await broker.persisted_jobs.page(ACME, limit=100, after=after)
    assert await client.zcard(KEYS.listed("acme")) == 300


async def test_notes_and_words_are_bounded(connect: Connect) -> None:
    """A note counts among its tenant's kept bytes; one that is too large, or a word of its own kind, is refused."""
    broker = await connect(budgets=Budgets(tenant_persisted_bytes=10_000))
    large = PersistOptions(1_000, JobMetadata(note=b"x" * 8_000), background=True)
    assert (await broker.jobs.enqueue_persisted(background(), large)).state is State.QUEUED
    with pytest.raises(OverCapacity, match="what is kept for your account"):
        await broker.jobs.enqueue_persisted(background(), large)
    with pytest.raises(BadMessage, match="note"):
        await broker.jobs.enqueue_persisted(background(), PersistOptions(1_000, JobMetadata(note=b"x" * 300_000)))
    with pytest.raises(BadMessage, match="topic"):
        PersistOptions(1_000, topic="two words")


async def test_only_an_abandoned_job_is_cancelled_as_one(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """While a Router that lives listens, or did a moment ago, it is left alone; one that is gone without a word does
    not count."""
    job = background(lane=Lane.INTERACTIVE)
    await broker.jobs.enqueue_persisted(job, PersistOptions(1_000, JobMetadata(resumable=True)), listener.router)
    await worker.claim_one()
    other = await Listener(client).open()
    await broker.output.attach(job.id, other.router)
    await broker.output.detach(job.id, other.router)
    assert await broker.jobs.cancel_abandoned(job.id, "its client left", 1) is State.LEASED
    assert (await told(broker, job)).state is State.LEASED
    await listener.leave()
    assert await broker.jobs.cancel_abandoned(job.id, "its client left", 60_000) is State.LEASED
    assert (await told(broker, job)).state is State.LEASED
    await asyncio.sleep(0.01)
    assert await broker.jobs.cancel_abandoned(job.id, "its client left", 1) is State.LEASED
    assert await broker.persisted_jobs.get(job.id) is None
    assert await broker.jobs.cancel_abandoned(new_job_id(0), "its client left", 1) is None
    await broker.output.detach(job.id, other.router)
    assert 0 < await client.pttl(KEYS.job(job.id)) <= 60_000


async def test_notices_that_nobody_takes_are_bounded(broker: Broker, client: Any) -> None:
    """The oldest are dropped and counted; what is no notice of ours is passed over."""
    few = Rewrite("persisted", "MAX_FINISHED = 100000", "MAX_FINISHED = 4")
    broker._caller._scripts = rewritten(broker._caller._scripts, few)
    await client.xadd(KEYS.finished, {"id": "nobody's"}, id="1-1")
    jobs = [background() for _ in range(5)]
    for job in jobs:
        await broker.jobs.enqueue_persisted(job, LISTED)
        await broker.jobs.cancel(job.id, "it ends")
    assert await client.hget(KEYS.finished_dropped, "dropped") == b"2"
    assert [notice.job_id for notice in await broker.persisted_jobs.read_finished(3)] == [job.id for job in jobs[1:4]]
    await client.xadd(KEYS.finished, {"id": "nobody's"})
    assert [notice.job_id for notice in await broker.persisted_jobs.read_finished()] == [job.id for job in jobs[1:]]
    assert await client.xlen(KEYS.finished) == 4
    with pytest.raises(BadRequest):
        await broker.persisted_jobs.acknowledge_finished(["9:1-1"])


async def test_a_replaced_answer_is_reported(broker: Broker, worker: Puller) -> None:
    """Once an attempt began anew after another one had said something, also when the job has ended; not before."""
    job = background()
    await broker.jobs.enqueue_persisted(job, LISTED)
    await broker.attempts.release(await worker.claim_one(), "nothing was said yet", counted=False)
    lost = await worker.claim_one()
    assert (await told(broker, job)).output_epoch == 0
    await broker.attempts.append(lost, piece(lost, 0, b"half"))
    before = await told(broker, job)
    assert (before.output_epoch, before.output_replaced) == (lost.epoch, False)
    await broker.maintenance.reclaim(worker.session_id)
    lease = await (await Puller(broker).join()).claim_one()
    await broker.attempts.append(lease, piece(lease, 0, b"another"))
    assert (await told(broker, job)).output_replaced
    await broker.jobs.cancel(job.id, "enough")
    after = await told(broker, job)
    assert (after.output_epoch, after.output_replaced) == (lease.epoch, True)


async def test_a_notice_is_enough_to_tell_how_a_response_ended(broker: Broker, worker: Puller) -> None:
    """Its job and state lead to the finish reason of the chat that it is."""
    job = background()
    await broker.jobs.enqueue_persisted(job, LISTED)
    lease = await worker.claim_one()
    ends = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    end = Frame(job.id, lease.epoch, lease.attempt_id, 1, END, ends).pack()
    await broker.attempts.append(lease, piece(lease, 0, b'data: {"choices": []}\n\n'))
    await broker.attempts.settle(lease, Outcome.DONE, end)
    (notice,) = await broker.persisted_jobs.read_finished()
    assert (notice.job_id, notice.topic) == (job.id, "response")
    assert await broker.output.response_status(notice.job_id, notice.state) == "incomplete"
    assert await broker.output.response_status(notice.job_id, State.CANCELLED) == "cancelled"
    await broker.persisted_jobs.delete(job.id, "its tenant wanted that")
    assert await broker.output.response_status(notice.job_id, notice.state) == "failed"
