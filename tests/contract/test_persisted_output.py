"""Persisted jobs: one job per idempotency key, output that is kept and sent to all who listen, budgets that return."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from broker import Broker, Budgets
from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    Enqueued,
    Frame,
    IdempotencyKeyReused,
    Job,
    JobId,
    JobMetadata,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    OutputPage,
    OverCapacity,
    PersistOptions,
    Settled,
    State,
    new_job_id,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from queue_schemas.persisted_output import key_digest
from tests.contract.conftest import Connect, Listener
from tests.support.queue import Puller, answer_frame, make_job
from tests.support.waiting import eventually

KEYS = ShardKeys(0)
SSE = "text/event-stream"
NOBODY = new_session_id("nobody")


def keyed(**fields: Any) -> Job:
    """A persisted stream under a key."""
    defaults = {"persisted": True, "idempotency_key": "order-17", "stream": True, "on_loss": "continue"}
    return make_job(**(defaults | fields))


def frames(lease: Lease, *data: bytes, first: int = 0, flags: int = HEAD, end: bool = False) -> list[Frame]:
    """Frames of a stream, from seq ``first`` on."""
    made = []
    for seq, piece in enumerate(data, first):
        mark = (flags if seq == 0 else 0) | (END if end and seq == first + len(data) - 1 else 0)
        head = (200, SSE) if mark & HEAD else (0, "")
        made.append(Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, mark, piece, *head))
    return made


def packed(run: list[Frame]) -> bytes:
    return b"".join(frame.pack() for frame in run)


async def whole(broker: Broker, job_id: JobId) -> OutputPage:
    """All that is kept of a job, which must fit a page."""
    page = await broker.output.read(job_id)
    assert page is not None
    assert page.complete
    return page


async def listening(client: Any) -> Listener:
    return await Listener(client).open()


async def test_one_key_is_one_job(broker: Broker, worker: Puller, listener: Listener) -> None:
    """The same request under the same key leads to the first one's job, whatever its id and however often; other
    tenants and other keys are on their own."""
    job = keyed()
    assert await broker.jobs.enqueue_persisted(job, listener=listener.router) == Enqueued(job.id, State.QUEUED)
    assert await broker.jobs.enqueue_persisted(job, listener=listener.router) == Enqueued(job.id, State.QUEUED)
    again = replace(job, id=new_job_id(0), request_id="another", ttl_ms=5)
    assert await broker.jobs.enqueue_persisted(again, listener=NOBODY) == Enqueued(job.id, State.QUEUED)
    for other in (keyed(tenant="rival"), keyed(idempotency_key="order-18")):
        assert await broker.jobs.enqueue_persisted(other, listener=NOBODY) == Enqueued(other.id, State.QUEUED)
    assert [lease.job.id for lease in await worker.claim(1)] == [job.id]
    assert (await broker.jobs.enqueue_persisted(again, listener=NOBODY)).state is State.LEASED
    assert len(await worker.claim(9)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"body": b'{"n":2}'},
        {"path": "/v1/completions"},
        {"content_type": "application/json; a=b"},
        {"model": "m2", "body": b'{"model":"m2"}'},
    ],
)
async def test_another_request_under_the_key_is_refused(broker: Broker, worker: Puller, other: dict[str, Any]) -> None:
    """[D1] Body (model included), path and content type make the request; nothing is queued for another one, also once
    the first is over."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=NOBODY)
    wrong = replace(job, id=new_job_id(0), **other)
    with pytest.raises(IdempotencyKeyReused, match="another request"):
        await broker.jobs.enqueue_persisted(wrong, listener=NOBODY)
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, packed(frames(lease, b"a", end=True)))
    with pytest.raises(IdempotencyKeyReused):
        await broker.jobs.enqueue_persisted(wrong, listener=NOBODY)
    assert await broker.output.read(wrong.id) is None


async def test_a_key_is_compared_by_what_its_client_asked(broker: Broker) -> None:
    """[D1] Where the job metadata says what was asked, that counts: the same job may be made of two requests."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, PersistOptions(60_000, JobMetadata(request_digest="one")))
    again = await broker.jobs.enqueue_persisted(
        replace(job, id=new_job_id(0)), PersistOptions(60_000, JobMetadata(request_digest="one"))
    )
    assert again.job_id == job.id
    with pytest.raises(IdempotencyKeyReused):
        await broker.jobs.enqueue_persisted(
            replace(job, id=new_job_id(0)), PersistOptions(60_000, JobMetadata(request_digest="another"))
        )


async def test_an_answer_that_is_kept_forgets_the_attempts_before_it(broker: Broker, worker: Puller) -> None:
    """As with any other job that has ended: an attempt that was handed back before the last one is fenced."""
    await broker.jobs.enqueue_persisted(keyed(), listener=NOBODY)
    first = await worker.claim_one()
    assert await broker.attempts.release(first, "draining", counted=False) is Settled.OK
    assert await broker.attempts.release(first, "draining", counted=False) is Settled.DUPLICATE
    last = await worker.claim_one()
    assert await broker.attempts.settle(last, Outcome.DONE, packed(frames(last, b"x", end=True))) is Settled.OK
    assert await broker.attempts.release(first, "draining", counted=False) is Settled.FENCED
    assert await broker.attempts.settle(last, Outcome.DONE, packed(frames(last, b"x", end=True))) is Settled.DUPLICATE


async def test_two_routers_that_ask_at_once_get_one_job(connect: Connect, worker: Puller) -> None:
    """Fifty requests with one key through two processes at the same moment are one job."""
    routers = [await connect(), await connect()]
    jobs = [keyed(id=new_job_id(0)) for _ in range(50)]
    found = await asyncio.gather(
        *(routers[number % 2].jobs.enqueue_persisted(job, listener=NOBODY) for number, job in enumerate(jobs))
    )
    assert len({answer.job_id for answer in found}) == 1
    assert len(await worker.claim(9)) == 1


async def test_output_reaches_all_who_listen_and_stays(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """Both Routers get every frame once it is there, the end included, and whoever comes later reads the same."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lease = await worker.claim_one()
    begin = frames(lease, b"one", b"two")
    assert await broker.attempts.append(lease, packed(begin)) is Settled.OK
    other = await listening(client)
    assert await broker.output.attach(job.id, other.router) == OutputPage(
        State.LEASED, 1, lease.attempt_id, (1, 2), tuple(begin), complete=True
    )
    rest = frames(lease, b"three", b"four", first=2, end=True)
    assert await broker.attempts.append(lease, packed(rest[:1])) is Settled.OK
    assert await broker.attempts.settle(lease, Outcome.DONE, packed(rest[1:])) is Settled.OK
    assert await listener.received() == begin + rest
    assert await other.received() == rest
    assert await whole(broker, job.id) == OutputPage(
        State.DONE, 1, lease.attempt_id, (1, 4), tuple(begin + rest), complete=True
    )
    assert (await whole(broker, job.id)).over
    assert await broker.jobs.enqueue_persisted(keyed(), listener=NOBODY) == Enqueued(job.id, State.DONE)
    assert not await client.exists(KEYS.listeners(job.id))
    assert await client.hget(KEYS.job(job.id), "env") is None


async def test_repeated_and_overlapping_appends_add_nothing_twice(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """Frames in doubt are sent again together with new ones: only the new ones are kept, and sent on."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lease = await worker.claim_one()
    run = frames(lease, b"0", b"1", b"2", b"3")
    await broker.attempts.append(lease, packed(run[:2]))
    assert await broker.attempts.append(lease, packed(run[:2])) is Settled.OK
    assert await broker.attempts.append(lease, packed(run)) is Settled.OK
    assert await broker.attempts.append(lease, packed(run[:1])) is Settled.OK
    assert await listener.received() == run
    assert (await whole(broker, job.id)).frames == tuple(run)
    ending = packed(frames(lease, b"3", b"4", first=3, end=True))
    assert await broker.attempts.settle(lease, Outcome.DONE, ending) is Settled.OK
    assert await broker.attempts.settle(lease, Outcome.DONE, ending) is Settled.DUPLICATE
    assert await broker.attempts.append(lease, packed(run)) is Settled.DUPLICATE
    assert len(await listener.received()) == 1
    assert len((await whole(broker, job.id)).frames) == 5


async def test_an_attempt_that_lost_its_job_adds_nothing(broker: Broker, worker: Puller, listener: Listener) -> None:
    """Appends of a reclaimed, unknown or cancelled attempt are refused, and reach nobody."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lease = await worker.claim_one()
    await broker.attempts.append(lease, packed(frames(lease, b"0")))
    await broker.maintenance.reclaim(worker.session_id)
    late = packed(frames(lease, b"1", first=1))
    assert await broker.attempts.append(lease, late) is Settled.FENCED
    assert await broker.attempts.settle(lease, Outcome.DONE, late) is Settled.FENCED
    again = await (await Puller(broker).join()).claim_one()
    await broker.jobs.cancel(job.id, "its tenant wanted that")
    assert await broker.attempts.append(again, packed(frames(again, b"x"))) is Settled.FENCED
    outsider = replace(lease, job=keyed())
    assert await broker.attempts.append(outsider, packed(frames(outsider, b"x"))) is Settled.GONE
    kinds = [news.kind for news in await listener.received() if isinstance(news, Marker)]
    assert kinds == [MarkerKind.REQUEUED, MarkerKind.CANCELLED]


async def test_a_lost_stream_waits_again_at_once_and_the_next_worker_finds_what_was_said(
    broker: Broker, worker: Puller, listener: Listener
) -> None:
    """No Router has to say where it goes on: that stands in the output, and a continued attempt adds to it."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lost = await worker.claim_one()
    said = frames(lost, b"Once ", b"upon ")
    await broker.attempts.append(lost, packed(said))
    assert (await broker.maintenance.reclaim(worker.session_id)).requeued == 1
    lease = await (await Puller(broker).join()).claim_one()
    assert (lease.epoch, lease.job) == (2, job)
    assert (await whole(broker, job.id)).frames == tuple(said)
    rest = frames(lease, b"a ", b"time", flags=HEAD | CONTINUED, end=True)
    await broker.attempts.append(lease, packed(rest[:1]))
    await broker.attempts.settle(lease, Outcome.DONE, packed(rest[1:]))
    assert (await whole(broker, job.id)).frames == tuple(said + rest)
    news = await listener.received()
    assert [item for item in news if isinstance(item, Frame)] == said + rest


async def test_an_attempt_that_begins_anew_replaces_what_was_kept(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """Whoever comes late reads one answer, not the beginnings of others; their bytes are given back."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lost = await worker.claim_one()
    await broker.attempts.append(lost, packed(frames(lost, b"x" * 5_000, b"y")))
    await broker.maintenance.reclaim(worker.session_id)
    lease = await (await Puller(broker).join()).claim_one()
    anew = frames(lease, b"It ", b"was", end=True)
    await broker.attempts.append(lease, packed(anew[:1]))
    assert (await whole(broker, job.id)).frames == tuple(anew[:1])
    await broker.attempts.append(lease, packed(anew[:1]))
    await broker.attempts.settle(lease, Outcome.DONE, packed(anew[1:]))
    assert (await whole(broker, job.id)).frames == tuple(anew)
    assert int(await client.hget(KEYS.budget, "t:acme:persisted")) == 1024 + len(packed(anew))


async def test_output_is_read_in_pages(broker: Broker, worker: Puller) -> None:
    """A page has at most some 1 MiB or 512 frames, however much there is; all pages together are the whole, once."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=NOBODY)
    lease = await worker.claim_one()
    run = frames(lease, *([b"x" * 300_000] * 9), *([b"y"] * 1_200))
    for start in range(0, len(run), 100):
        assert await broker.attempts.append(lease, packed(run[start : start + 100])) is Settled.OK
    found: list[Frame] = []
    pages = 0
    complete = False
    while not complete:
        page = await broker.output.read(job.id, (found[-1].epoch, found[-1].seq + 1) if found else (0, 0))
        assert page is not None
        assert page.frames
        assert len(page.frames) <= 512 + 16
        assert sum(len(frame.data) for frame in page.frames) < 1_048_576 + 300_000
        found += page.frames
        complete = page.complete
        pages += 1
    assert found == run
    assert pages > 4
    assert [frame async for frame in broker.output.frames(job.id)] == run
    assert [frame async for frame in broker.output.frames(new_job_id(0))] == []
    behind = await broker.output.read(job.id, (1, len(run)))
    assert behind is not None
    assert behind.frames == ()
    assert behind.complete


async def test_a_page_goes_beyond_the_frame_that_its_reader_has(broker: Broker, worker: Puller) -> None:
    """However large that is: a reader which asks from its last frame gets on."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=NOBODY)
    lease = await worker.claim_one()
    run = frames(lease, b"x" * 1_200_000, b"y" * 1_200_000, b"z")
    assert await broker.attempts.append(lease, packed(run)) is Settled.OK
    page = await broker.output.read(job.id, (1, 0))
    assert page is not None
    assert page.frames == tuple(run[:2])
    assert not page.complete


async def test_a_router_that_is_gone_is_forgotten(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """Output goes on without it, and no stream is made for it; one that detached is sent nothing more."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    stays = await listening(client)
    await broker.output.attach(job.id, stays.router)
    lease = await worker.claim_one()
    await listener.leave()
    run = frames(lease, b"0", b"1")
    assert await broker.attempts.append(lease, packed(run[:1])) is Settled.OK
    assert await client.smembers(KEYS.listeners(job.id)) == {stays.router.encode()}
    assert not await client.exists(KEYS.reply(listener.router))
    await broker.output.detach(job.id, stays.router)
    assert await broker.attempts.append(lease, packed(run[1:])) is Settled.OK
    assert await stays.received() == run[:1]


async def test_a_stray_beginning_cancels_no_stored_job(broker: Broker, worker: Puller, listener: Listener) -> None:
    """A Router that is sent something of a job nobody asked for there has an ordinary one cancelled; one that is stored
    has others who wait, and one that is lost may be queued again by them."""
    job, ordinary = keyed(), make_job(reply_to=listener.router)
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    await broker.jobs.enqueue(ordinary)
    assert await broker.jobs.cancel(job.id, "nobody waits", if_orphaned=True) is State.QUEUED
    assert await broker.jobs.cancel(ordinary.id, "nobody waits", if_orphaned=True) is State.QUEUED
    assert [lease.job.id for lease in await worker.claim(5)] == [job.id]
    lost = keyed(idempotency_key="lost")
    assert await broker.jobs.cancel(lost.id, "nobody waits", if_orphaned=True) is None
    assert await broker.jobs.enqueue_persisted(lost, listener=NOBODY) == Enqueued(lost.id, State.QUEUED)


async def test_a_late_answer_is_sent_but_not_kept(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """A worker that noticed the deadline says so to all who listen; the same key may be tried again."""
    job = keyed(stream=False)
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lease = await worker.claim_one()
    assert await broker.attempts.settle(lease, Outcome.EXPIRED, answer_frame(lease)) is Settled.OK
    assert len(await listener.received()) == 1
    assert (await whole(broker, job.id)).frames == ()
    assert await client.hget(KEYS.budget, "t:acme:persisted") is None
    again = keyed(stream=False)
    assert await broker.jobs.enqueue_persisted(again, listener=NOBODY) == Enqueued(again.id, State.QUEUED)


@pytest.mark.parametrize("ending", ["cancelled", "expired", "dead"])
async def test_a_job_without_an_answer_lets_go_of_its_key(
    broker: Broker, worker: Puller, listener: Listener, client: Any, ending: str
) -> None:
    """All who listen are told, nothing is kept, and the same key runs anew."""
    job = keyed(max_attempts=1, ttl_ms=300 if ending == "expired" else 60_000)
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    other = await listening(client)
    await broker.output.attach(job.id, other.router)
    lease = await worker.claim_one()
    await broker.attempts.append(lease, packed(frames(lease, b"half")))
    if ending == "cancelled":
        await broker.jobs.cancel(job.id, "somebody")
    elif ending == "dead":
        await broker.attempts.release(lease, "the engine failed", counted=True)
    else:

        async def has_expired() -> bool:
            await broker.maintenance.expire()
            found = await broker.output.read(job.id)
            return found is not None and found.state is State.EXPIRED

        await eventually(has_expired, "it has expired")
    for one in (listener, other):
        news = (await one.received())[-1]
        assert isinstance(news, Marker)
        assert news.kind == ending
    assert (await whole(broker, job.id)).frames == ()
    assert await client.hget(KEYS.budget, "t:acme:persisted") is None
    again = keyed()
    assert await broker.jobs.enqueue_persisted(again, listener=NOBODY) == Enqueued(again.id, State.QUEUED)


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
async def test_what_is_kept_is_forgotten_in_time(broker: Broker, worker: Puller, client: Any, outcome: Outcome) -> None:
    """After its time the sweep leaves nothing of an answer: no record, output, key or byte of the budget."""
    job = keyed(stream=False)
    await broker.jobs.enqueue_persisted(job, PersistOptions(100), NOBODY)
    lease = await worker.claim_one()
    assert await broker.attempts.settle(lease, outcome, answer_frame(lease)) is Settled.OK
    forgotten = 0

    async def swept() -> bool:
        nonlocal forgotten
        forgotten += (await broker.maintenance.expire()).forgotten
        return forgotten > 0

    await eventually(swept, "it is forgotten")
    assert forgotten == 1
    assert await broker.output.read(job.id) is None
    left = {key.decode() async for key in client.scan_iter()}
    gone = {KEYS.job(job.id), KEYS.out(job.id), KEYS.idempotency(key_digest(job)), KEYS.persisted, KEYS.budget}
    assert not left & (gone | {KEYS.listeners(job.id), KEYS.deadlines})
    again = keyed(stream=False)
    assert await broker.jobs.enqueue_persisted(again, listener=NOBODY) == Enqueued(again.id, State.QUEUED)


async def test_a_sweep_keeps_up_with_what_is_to_be_forgotten(
    broker: Broker, worker: Puller, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many answers end in the same second, one sweep forgets them: a call with a limit is made again."""
    monkeypatch.setattr("broker.operations.maintenance._EXPIRE_STEP", 4)
    jobs = [keyed(stream=False, idempotency_key=f"order-{number}") for number in range(14)]
    for job in jobs:
        await broker.jobs.enqueue_persisted(job, PersistOptions(1), NOBODY)
    for lease in await worker.claim(len(jobs)):
        assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK

    async def all_are_due() -> bool:
        last = await client.zrange(KEYS.persisted, -1, -1, withscores=True)
        seconds, microseconds = await client.time()
        return int(last[0][1]) < seconds * 1000 + microseconds // 1000

    await eventually(all_are_due, "their time is over")
    assert (await broker.maintenance.expire()).forgotten == len(jobs)
    assert not await client.exists(KEYS.persisted)
    assert await client.hget(KEYS.budget, "t:acme:persisted") is None


async def test_kept_bytes_are_bounded_per_tenant(connect: Connect, client: Any) -> None:
    """Past the limit a new keyed request is refused, with the reason; what holds a key already is found, ordinary
    requests and other tenants go on."""
    broker = await connect(budgets=Budgets(tenant_persisted_bytes=3_000))
    worker = await Puller(broker).join()
    first = keyed(stream=False)
    await broker.jobs.enqueue_persisted(first, listener=NOBODY)
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, b"x" * 2_000))
    with pytest.raises(OverCapacity, match=r"Idempotency-Key\) fills its limit"):
        await broker.jobs.enqueue_persisted(keyed(idempotency_key="other"), listener=NOBODY)
    assert await broker.jobs.enqueue_persisted(keyed(stream=False), listener=NOBODY) == Enqueued(first.id, State.DONE)
    assert await broker.jobs.enqueue(make_job()) is State.QUEUED
    assert (await broker.jobs.enqueue_persisted(keyed(tenant="rival"), listener=NOBODY)).state is State.QUEUED


async def test_output_that_the_server_lost_is_not_passed_over(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """An attempt whose earlier frames are not there any more loses its job, so that no answer is kept with a hole."""
    job = keyed()
    await broker.jobs.enqueue_persisted(job, listener=listener.router)
    lease = await worker.claim_one()
    run = frames(lease, b"0", b"1", b"2")
    await broker.attempts.append(lease, packed(run[:1]))
    assert await broker.attempts.append(lease, packed(run[2:])) is Settled.FENCED
    (kept, marker) = await listener.received()
    assert kept == run[0]
    assert isinstance(marker, Marker)
    assert (marker.kind, marker.epoch) == (MarkerKind.REQUEUED, 2)
    assert (await whole(broker, job.id)).frames == (run[0],)
    assert (await (await Puller(broker).join()).claim_one()).attempt == 1


async def test_routers_that_wait_for_a_job_the_server_lost_end_with_one(
    connect: Connect, worker: Puller, listener: Listener, client: Any
) -> None:
    """Job and key are lost with the server's latest writes. Both Routers queue it again by its id, a third client asks
    with the key: one job, and both listen to it."""
    one, two = await connect(), await connect()
    job = keyed()
    await one.jobs.enqueue_persisted(job, listener=listener.router)
    other = await listening(client)
    await client.delete(KEYS.job(job.id), KEYS.idempotency(key_digest(job)), KEYS.listeners(job.id))
    assert await one.output.attach(job.id, listener.router) is None
    answers = await asyncio.gather(
        one.jobs.enqueue_persisted(job, listener=listener.router),
        two.jobs.enqueue_persisted(job, listener=other.router),
    )
    assert answers == [Enqueued(job.id, State.QUEUED)] * 2
    assert (await two.jobs.enqueue_persisted(keyed(), listener=NOBODY)).job_id == job.id
    lease = (await worker.claim(9))[-1]
    run = frames(lease, b"0")
    await one.attempts.append(lease, packed(run))
    assert await listener.received() == run
    assert await other.received() == run


async def test_a_lost_job_gives_way_to_the_one_that_took_its_key(broker: Broker) -> None:
    """Where another client asked first, the Routers that still wait for the lost job are led to the new one."""
    lost, new = keyed(), keyed()
    await broker.jobs.enqueue_persisted(new, listener=NOBODY)
    assert await broker.jobs.enqueue_persisted(lost, listener=NOBODY) == Enqueued(new.id, State.QUEUED)
