"""Fencing: once an attempt has ended or was taken away, nothing more of it counts, and repeats change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from broker import Broker, Reclaimed
from queue_schemas import (
    BrokerUnavailable,
    Control,
    ControlKind,
    Fenced,
    Frame,
    Lane,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    Settled,
    State,
    new_job_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, answer_frame, make_job, record_of

from .conftest import Connect, Listener

Loss = Callable[[Broker, Puller, Lease], Awaitable[object]]


async def _reclaimed(broker: Broker, worker: Puller, lease: Lease) -> object:
    return await broker.maintenance.reclaim(worker.session_id)


async def _left(broker: Broker, worker: Puller, lease: Lease) -> object:
    return await broker.workers.leave(worker.session_id)


async def _cancelled(broker: Broker, worker: Puller, lease: Lease) -> object:
    return await broker.jobs.cancel(lease.job.id, "the client went away")


async def _expired(broker: Broker, worker: Puller, lease: Lease) -> object:
    await asyncio.sleep(lease.remaining_ms / 1000 + 0.005)
    return await broker.maintenance.expire()


LOSSES: dict[str, Loss] = {"reclaim": _reclaimed, "leave": _left, "cancel": _cancelled, "expire": _expired}
TTL_MS: dict[Loss, int] = {_reclaimed: 60_000, _left: 60_000, _cancelled: 60_000, _expired: 400}
"""Long enough to be claimed first on a busy machine."""


async def waiting(broker: Broker) -> int:
    """How many jobs wait."""
    return sum(depth.waiting for lanes in (await broker.stats.depths()).values() for depth in lanes.values())


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    """The ways in which an attempt is taken from a worker."""
    return LOSSES[request.param]


async def test_the_answer_of_a_lost_attempt_is_refused(
    broker: Broker, worker: Puller, listener: Listener, loss: Loss
) -> None:
    """After reclaim, leave, cancel or expiry a late settle is FENCED, and its frames reach nobody."""
    await broker.jobs.enqueue(make_job(reply_to=listener.router, ttl_ms=TTL_MS[loss]))
    lease = await worker.claim_one()
    await loss(broker, worker, lease)
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.FENCED
    assert [type(news) for news in await listener.received()] == [Marker]


async def test_a_lost_attempt_cannot_be_handed_back(broker: Broker, worker: Puller, loss: Loss) -> None:
    """After reclaim, leave, cancel or expiry a late release does not queue the job a second time."""
    await broker.jobs.enqueue(make_job(ttl_ms=TTL_MS[loss]))
    lease = await worker.claim_one()
    await loss(broker, worker, lease)
    before = await waiting(broker)
    assert await broker.attempts.release(lease, "draining", counted=True) is Settled.FENCED
    assert await waiting(broker) == before


async def test_only_the_newest_attempt_may_answer(broker: Broker, worker: Puller, listener: Listener) -> None:
    """The first attempt was lost and comes back late, while the second runs: only the second's answer is taken."""
    await broker.jobs.enqueue(make_job(reply_to=listener.router))
    late = await worker.claim_one()
    await broker.maintenance.reclaim(worker.session_id)
    second = await Puller(broker).join()
    lease = await second.claim_one()
    assert (lease.epoch, lease.attempt) == (late.epoch + 1, 2)
    assert await broker.attempts.settle(late, Outcome.DONE, answer_frame(late, b"late")) is Settled.FENCED
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, b"right")) is Settled.OK
    assert await broker.attempts.settle(late, Outcome.DONE, answer_frame(late, b"later")) is Settled.FENCED
    marker, frame = await listener.received()
    assert isinstance(marker, Marker) and isinstance(frame, Frame)
    assert (marker.kind, marker.epoch) == (MarkerKind.REQUEUED, 2)
    assert (frame.data, frame.epoch, frame.attempt_id) == (b"right", 2, lease.attempt_id)


async def test_a_wrong_attempt_id_or_epoch_is_fenced(broker: Broker, worker: Puller) -> None:
    """Both must be equal: a guess of either does not settle."""
    await broker.jobs.enqueue(make_job())
    lease = await worker.claim_one()
    assert await broker.attempts.settle(replace(lease, attempt_id="other"), Outcome.DONE) is Settled.FENCED
    assert await broker.attempts.settle(replace(lease, epoch=lease.epoch + 1), Outcome.DONE) is Settled.FENCED
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_settling_twice_is_a_duplicate(
    broker: Broker, worker: Puller, listener: Listener, outcome: Outcome
) -> None:
    """A repeat is recognised; the answer goes out once, and the state stays."""
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    assert await broker.attempts.settle(lease, outcome, answer_frame(lease)) is Settled.OK
    assert await broker.attempts.settle(lease, outcome, answer_frame(lease)) is Settled.DUPLICATE
    assert len(await listener.received()) == 1
    assert await broker.jobs.enqueue(job) is State(outcome)


async def test_settling_twice_at_once_answers_once(broker: Broker, worker: Puller, listener: Listener) -> None:
    """The same settle twice in one batch: one OK, one DUPLICATE, one answer."""
    await broker.jobs.enqueue(make_job(reply_to=listener.router))
    lease = await worker.claim_one()
    answers = await asyncio.gather(
        *(broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) for _ in range(2))
    )
    assert sorted(answers) == [Settled.DUPLICATE, Settled.OK]
    assert len(await listener.received()) == 1


async def test_releasing_twice_is_a_duplicate(broker: Broker, worker: Puller) -> None:
    """A repeated release queues the job once and spends one attempt."""
    await broker.jobs.enqueue(make_job())
    lease = await worker.claim_one()
    assert await broker.attempts.release(lease, "the engine failed", counted=True) is Settled.OK
    assert await broker.attempts.release(lease, "the engine failed", counted=True) is Settled.DUPLICATE
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == 1
    other = await Puller(broker).join()
    assert (await other.claim_one()).attempt == 2
    assert await other.claim() == []


async def test_what_was_released_cannot_be_settled(broker: Broker, worker: Puller) -> None:
    """A worker that handed a job back does not own it any more."""
    await broker.jobs.enqueue(make_job())
    lease = await worker.claim_one()
    await broker.attempts.release(lease, "draining", counted=False)
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.FENCED
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == 1


async def test_what_was_settled_cannot_be_released(broker: Broker, worker: Puller) -> None:
    """Handing back after the answer changes nothing."""
    job = make_job()
    await broker.jobs.enqueue(job)
    lease = await worker.claim_one()
    await broker.attempts.settle(lease, Outcome.DONE)
    assert await broker.attempts.release(lease, "draining", counted=False) is Settled.DUPLICATE
    assert await broker.jobs.enqueue(job) is State.DONE
    assert await broker.stats.depths() == {}


async def test_a_job_nobody_knows_is_gone(broker: Broker, worker: Puller) -> None:
    """Settling or releasing what has no record any more says so."""
    await broker.jobs.enqueue(make_job())
    lease = await worker.claim_one()
    unknown = replace(lease, job=replace(lease.job, id=new_job_id(0)))
    assert await broker.attempts.settle(unknown, Outcome.DONE) is Settled.GONE
    assert await broker.attempts.release(unknown, "draining", counted=True) is Settled.GONE


async def test_one_refused_item_does_not_spoil_its_batch(broker: Broker, worker: Puller) -> None:
    """Answers of a batch are each item's own."""
    for _ in range(3):
        await broker.jobs.enqueue(make_job())
    leases = await worker.claim(3)
    await broker.jobs.cancel(leases[1].job.id, "gone")
    answers = await asyncio.gather(*(broker.attempts.settle(lease, Outcome.DONE) for lease in leases))
    assert answers == [Settled.OK, Settled.FENCED, Settled.OK]


# The dead


async def test_a_reclaimed_worker_gets_and_keeps_nothing(broker: Broker, worker: Puller) -> None:
    """After a reclaim the session id can neither claim nor renew; a new session id of it can."""
    for _ in range(2):
        await broker.jobs.enqueue(make_job())
    await worker.claim(1)
    await broker.maintenance.reclaim(worker.session_id)
    with pytest.raises(Fenced):
        await worker.claim()
    with pytest.raises(Fenced):
        await broker.workers.renew(worker.session_id)
    reborn = await Puller(broker).join()
    assert len(await reborn.claim(2)) == 2


async def test_a_reclaimed_workers_repeat_gives_nothing(broker: Broker, worker: Puller) -> None:
    """Even the repeat of a claim that had been answered is refused to the dead."""
    await broker.jobs.enqueue(make_job())
    await worker.claim_one()
    await broker.maintenance.reclaim(worker.session_id)
    worker.seq -= 1
    with pytest.raises(Fenced):
        await worker.claim()


async def test_a_reclaimed_attempt_is_fenced_also_when_it_was_the_last(broker: Broker, worker: Puller) -> None:
    """Its worker did not end the job itself, so its late answer is no repeat of anything."""
    await broker.jobs.enqueue(make_job(max_attempts=1))
    lease = await worker.claim_one()
    assert await broker.maintenance.reclaim(worker.session_id) == Reclaimed(dead=1)
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.FENCED
    assert await broker.attempts.release(lease, "the engine failed", counted=True) is Settled.FENCED


async def test_a_reclaim_takes_everything_and_repeats_harmlessly(broker: Broker, worker: Puller) -> None:
    """More jobs than one step takes: all of them wait again, once; a second reclaim finds nothing."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(600)))
    held = 0
    while held < 600:
        held += len(await worker.claim(100))
    assert await broker.maintenance.reclaim(worker.session_id) == Reclaimed(requeued=600)
    assert await broker.maintenance.reclaim(worker.session_id) == Reclaimed()
    depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
    assert (depth.waiting, depth.leased) == (600, 0)


async def test_two_managers_that_reclaim_at_once_do_no_harm(broker: Broker, worker: Puller) -> None:
    """Scripts recheck the facts: each job waits again once and spends one attempt."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(20)))
    await worker.claim(20)
    results = await asyncio.gather(*(broker.maintenance.reclaim(worker.session_id) for _ in range(3)))
    assert sum(result.requeued for result in results) == 20
    other = await Puller(broker).join()
    leases = await other.claim(30)
    assert [lease.attempt for lease in leases] == [2] * 20


async def test_a_renewal_raises_the_number_that_the_manager_watches(broker: Broker, worker: Puller) -> None:
    """Liveness is a number per session id that grows, on nobody's wall clock."""
    before = (await broker.maintenance.renewal_counters())[worker.session_id]
    await broker.workers.renew(worker.session_id)
    assert (await broker.maintenance.renewal_counters())[worker.session_id] > before
    await broker.workers.leave(worker.session_id)
    assert worker.session_id not in await broker.maintenance.renewal_counters()


# Attempts


async def test_attempts_are_bounded(broker: Broker, worker: Puller, listener: Listener) -> None:
    """A job whose every attempt is lost is started max_attempts times and then ends as a dead letter with its cause."""
    job = make_job(max_attempts=3, reply_to=listener.router)
    await broker.jobs.enqueue(job)
    for attempt in (1, 2, 3):
        puller = await Puller(broker).join()
        assert (await puller.claim_one()).attempt == attempt
        fate = await broker.maintenance.reclaim(puller.session_id)
        assert fate == (Reclaimed(requeued=1) if attempt < 3 else Reclaimed(dead=1))
    assert await worker.claim() == []
    assert await broker.jobs.enqueue(job) is State.DEAD
    kinds = [news.kind for news in await listener.received() if isinstance(news, Marker)]
    assert kinds == [MarkerKind.REQUEUED, MarkerKind.REQUEUED, MarkerKind.DEAD]


async def test_handing_back_spends_no_attempt(broker: Broker, worker: Puller) -> None:
    """A drain may hand a job back any number of times; the epoch rises, the attempts do not."""
    await broker.jobs.enqueue(make_job(max_attempts=1))
    for epoch in range(1, 6):
        lease = await worker.claim_one()
        assert (lease.attempt, lease.epoch) == (1, epoch)
        assert await broker.attempts.release(lease, "draining", counted=False) is Settled.OK


async def test_a_worker_that_leaves_spends_no_attempts(broker: Broker, worker: Puller) -> None:
    """What a leaving worker still held is handed back as if never started."""
    await broker.jobs.enqueue(make_job(max_attempts=1))
    await worker.claim_one()
    assert await broker.workers.leave(worker.session_id) == Reclaimed(requeued=1)
    other = await Puller(broker).join()
    assert (await other.claim_one()).attempt == 1


async def test_a_poisoned_job_does_not_take_its_neighbours_along(broker: Broker) -> None:
    """A job that kills every worker that runs it dies; those that shared the workers with it all finish."""
    poison = make_job(max_attempts=3)
    neighbours = [make_job(max_attempts=20) for _ in range(10)]
    await asyncio.gather(*map(broker.jobs.enqueue, [*neighbours[:5], poison, *neighbours[5:]]))
    done: set[str] = set()
    for _ in range(20):
        puller = await Puller(broker).join()
        leases = await puller.claim(4)
        if any(lease.job.id == poison.id for lease in leases):
            await broker.maintenance.reclaim(puller.session_id)
            continue
        for lease in leases:
            await broker.attempts.settle(lease, Outcome.DONE)
            done.add(lease.job.id)
        await broker.workers.leave(puller.session_id)
    assert done == {job.id for job in neighbours}
    assert await broker.jobs.enqueue(poison) is State.DEAD


async def test_an_envelope_that_cannot_be_read_is_left_to_others_and_ends(broker: Broker, client: Any) -> None:
    """A worker of another version refuses the job, is told to claim again, and the job ends as a dead letter."""
    worker = await Puller(broker).join()
    job = make_job(max_attempts=1)
    await broker.jobs.enqueue(job)
    key = ShardKeys(0).job(job.id)
    await client.hset(key, "env", b"\xc1 from another age")
    assert await worker.claim(1) == []
    assert Control(ControlKind.WAKE) in await worker.control_messages()
    assert (await record_of(client, key))["state"] == "dead"
    ((_, letter),) = await client.xrange(ShardKeys(0).dead)
    assert b"cannot read" in letter[b"cause"]


async def test_a_half_done_reclaim_is_finished_by_another_manager(
    broker: Broker, connect: Connect, worker: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Manager that dies in the middle of a reclaim leaves a worker that is fenced already and still stands in the
    renewals, where the next Manager finds it standing still and takes back the rest."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(10)))
    await worker.claim(10)
    monkeypatch.setattr("broker.operations.maintenance._RECLAIM_STEP", 3)
    dying = await connect()
    steps = 0
    send = dying._caller.script

    async def dies_after_one_step(*args: object, **options: object) -> object:
        nonlocal steps
        steps += 1
        if steps > 1:
            raise BrokerUnavailable("the Manager is gone")
        return await send(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dying._caller, "script", dies_after_one_step)
    with pytest.raises(BrokerUnavailable):
        await dying.maintenance.reclaim(worker.session_id)
    assert await waiting(broker) == 3
    with pytest.raises(Fenced):
        await worker.claim()
    with pytest.raises(Fenced):
        await broker.workers.renew(worker.session_id)
    assert worker.session_id in await broker.maintenance.renewal_counters()
    await broker.workers.join(worker.session_id)  # a late copy does not let it in again
    with pytest.raises(Fenced):
        await worker.claim()
    assert (await broker.maintenance.reclaim(worker.session_id)).requeued == 7
    assert await waiting(broker) == 10
    assert worker.session_id not in await broker.maintenance.renewal_counters()
