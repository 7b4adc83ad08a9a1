"""Reply lost after commit: the server did it, the caller never heard. The retried call has no second effect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from broker import Broker, BrokerSettings, Expired, Reclaimed
from broker.redis.scripts import load_scripts
from queue_schemas import (
    HEAD,
    BrokerUnavailable,
    ControlKind,
    Enqueued,
    Frame,
    Lane,
    Outcome,
    Settled,
    State,
    new_job_id,
    new_session_id,
)
from queue_schemas.keys import ShardKeys
from tests.support.fault_proxy import FaultProxy
from tests.support.queue import MODEL, Puller, ServerBackend, answer_frame, make_job

from .conftest import Listener

_SHAS = {name: script.sha.encode() for name, script in load_scripts(flags=True).items()}


@dataclass
class Faulty:
    """A broker whose replies can be lost, and one on a sound line to look and to set up."""

    broker: Broker
    sound: Broker
    proxy: FaultProxy
    listener: Listener
    backend: ServerBackend

    def lose(self, script: str, times: int = 1) -> None:
        """Lose the next replies of ``script``."""
        self.proxy.lose_reply(_SHAS[script], times)

    async def counts(self) -> tuple[int, int]:
        """Waiting and leased jobs of the model."""
        lanes = (await self.sound.stats.depths()).get(MODEL, {})
        depth = lanes.get(Lane.INTERACTIVE)
        return (depth.waiting, depth.leased) if depth else (0, 0)


@pytest.fixture
async def faulty(real_backend: ServerBackend) -> AsyncIterator[Faulty]:
    """A broker behind the fault proxy; the scripts are loaded, so that every call commits on its first try."""
    client = real_backend.client()
    for script in load_scripts(flags=True).values():
        await client.script_load(script.source)
    async with FaultProxy(real_backend.server.port) as proxy:
        sound = await real_backend.connect()
        broker = await Broker.connect(BrokerSettings(redis_url=proxy.url, retry_limit_ms=10_000))
        listener = await Listener(client).open()
        yield Faulty(broker, sound, proxy, listener, real_backend)
        assert proxy.replies_lost > 0, "the fault did not happen: the test has proved nothing"
        assert broker.retries > 0
        await broker.close()
        await sound.close()
    await client.aclose()


@pytest.mark.parametrize("times", [1, 3])
async def test_enqueue(faulty: Faulty, times: int) -> None:
    """The job is queued once, however many replies are lost."""
    job = make_job()
    faulty.lose("enqueue", times)
    assert await faulty.broker.jobs.enqueue(job) is State.QUEUED
    assert faulty.proxy.replies_lost == times
    worker = await Puller(faulty.sound).join()
    assert [lease.job for lease in await worker.claim(5)] == [job]


async def test_claim(faulty: Faulty) -> None:
    """The retried claim gives the leases that the first one took: none is lost until the worker dies, none doubled."""
    for _ in range(6):
        await faulty.sound.jobs.enqueue(make_job())
    worker = await Puller(faulty.broker).join()
    faulty.lose("claim")
    leases = await worker.claim(4)
    assert len(leases) == 4
    assert await faulty.counts() == (2, 4)
    for lease in leases:
        assert await faulty.broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_claim_that_parks(faulty: Faulty) -> None:
    """A parked worker whose answer was lost is parked once, and woken once."""
    worker = await Puller(faulty.broker).join()
    faulty.lose("claim")
    assert await worker.claim() == []
    await faulty.sound.jobs.enqueue(make_job())
    await faulty.sound.jobs.enqueue(make_job())
    assert [message.kind for message in await worker.control_messages()] == [ControlKind.WAKE]


async def test_settle(faulty: Faulty) -> None:
    """The answer is published once; the worker learns that its own first call did it."""
    await faulty.sound.jobs.enqueue(make_job(reply_to=faulty.listener.router))
    worker = await Puller(faulty.broker).join()
    lease = await worker.claim_one()
    faulty.lose("settle")
    assert await faulty.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) in (
        Settled.OK,
        Settled.DUPLICATE,
    )
    assert len(await faulty.listener.received()) == 1
    assert await faulty.counts() == (0, 0)


@pytest.mark.parametrize("counted", [True, False])
async def test_release(faulty: Faulty, counted: bool) -> None:
    """The job waits once more, one attempt spent or none, one marker sent."""
    await faulty.sound.jobs.enqueue(make_job(reply_to=faulty.listener.router))
    worker = await Puller(faulty.broker).join()
    lease = await worker.claim_one()
    faulty.lose("release")
    answer = await faulty.broker.attempts.release(lease, "draining", counted=counted)
    assert answer in (Settled.OK, Settled.DUPLICATE)
    assert await faulty.counts() == (1, 0)
    assert len(await faulty.listener.received()) == 1
    again = await (await Puller(faulty.sound).join()).claim_one()
    assert (again.epoch, again.attempt) == (2, 2 if counted else 1)


async def test_release_of_what_yielded(faulty: Faulty) -> None:
    """The job waits once more behind what it said, and has yielded once."""
    job = make_job(lane=Lane.BATCH, yields=2, reply_to=faulty.listener.router)
    await faulty.sound.jobs.enqueue(job)
    lease = await (await Puller(faulty.broker).join()).claim_one()
    faulty.lose("release")
    following = replace(job, prefix="Once", yields=1)
    assert await faulty.broker.attempts.release_yielded(lease, "it yields", following) in (
        Settled.OK,
        Settled.DUPLICATE,
    )
    again = await (await Puller(faulty.sound).join()).claim_one()
    assert (again.job, again.epoch, again.attempt) == (following, 2, 1)
    assert (await faulty.sound.stats.job_counts()).events[MODEL, Lane.BATCH, "yielded"] == 1
    assert len(await faulty.listener.received()) == 1


async def test_resume(faulty: Faulty) -> None:
    """A lost stream waits once more, behind what was delivered."""
    job = make_job(reply_to=faulty.listener.router, stream=True, on_loss="continue")
    await faulty.sound.jobs.enqueue(job)
    worker = await Puller(faulty.sound).join()
    await worker.claim_one()
    await faulty.sound.maintenance.reclaim(worker.session_id)
    faulty.lose("resume")
    assert await faulty.broker.jobs.resume(replace(job, prefix="Once"), 2) is State.QUEUED
    assert await faulty.counts() == (1, 0)
    assert (await (await Puller(faulty.sound).join()).claim_one()).job.prefix == "Once"


async def test_enqueue_under_a_key(faulty: Faulty) -> None:
    """There is one job and one listener, and its key leads to it."""
    job = make_job(persisted=True, idempotency_key="order-17")
    faulty.lose("enqueue", 2)
    assert await faulty.broker.jobs.enqueue_persisted(job, listener=faulty.listener.router) == Enqueued(
        job.id, State.QUEUED
    )
    assert await faulty.counts() == (1, 0)
    again = replace(job, id=new_job_id(0))
    assert await faulty.sound.jobs.enqueue_persisted(again, listener=faulty.listener.router) == Enqueued(
        job.id, State.QUEUED
    )


async def test_append_and_its_end(faulty: Faulty) -> None:
    """Frames are kept and sent on once: those of an append that is in doubt and sent again, and the last ones."""
    job = make_job(persisted=True, stream=True)
    await faulty.sound.jobs.enqueue_persisted(job, listener=faulty.listener.router)
    lease = await (await Puller(faulty.sound).join()).claim_one()
    run = [Frame(job.id, 1, lease.attempt_id, 0, HEAD, b"x", 200, "text/event-stream")]
    run += [Frame(job.id, 1, lease.attempt_id, seq, 0, b"x") for seq in (1, 2)]
    faulty.lose("settle")
    with pytest.raises(BrokerUnavailable):
        await faulty.broker.attempts.append(lease, run[0].pack())
    assert await faulty.broker.attempts.append(lease, run[0].pack() + run[1].pack()) is Settled.OK
    faulty.lose("settle")
    assert await faulty.broker.attempts.settle(lease, Outcome.DONE, run[2].pack()) in (Settled.OK, Settled.DUPLICATE)
    assert await faulty.listener.received() == run
    page = await faulty.sound.output.read(job.id)
    assert page is not None
    assert page.frames == tuple(run)
    assert await faulty.counts() == (0, 0)


async def test_attach(faulty: Faulty) -> None:
    """The Router is one listener, and is sent each frame once."""
    job = make_job(persisted=True)
    await faulty.sound.jobs.enqueue_persisted(job, listener=new_session_id("other"))
    faulty.lose("attach")
    assert await faulty.broker.output.attach(job.id, faulty.listener.router) is not None
    lease = await (await Puller(faulty.sound).join()).claim_one()
    await faulty.sound.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    assert len(await faulty.listener.received()) == 1


async def test_crashed(faulty: Faulty) -> None:
    """Each job is charged once, and waits once more."""
    for _ in range(3):
        await faulty.sound.jobs.enqueue(make_job())
    worker = await Puller(faulty.sound).join()
    leases = await worker.claim(3)
    faulty.lose("release")
    assert set(await faulty.broker.attempts.report_crash(leases, "it crashed")) <= {Settled.OK, Settled.DUPLICATE}
    assert await faulty.counts() == (3, 0)
    again = await (await Puller(faulty.sound).join()).claim_one()
    assert (again.epoch, again.attempt, again.suspect) == (2, 2, True)


async def test_clear(faulty: Faulty) -> None:
    """A job that was cleared stays so."""
    await faulty.sound.jobs.enqueue(make_job())
    worker = await Puller(faulty.sound).join()
    await faulty.sound.attempts.report_crash([await worker.claim_one()], "it crashed")
    again = await (await Puller(faulty.sound).join()).claim_one()
    faulty.lose("clear_suspicion")
    assert await faulty.broker.attempts.clear_suspicion(again) is Settled.OK
    assert await faulty.sound.attempts.settle(again, Outcome.DONE) is Settled.OK


async def test_release_that_buries(faulty: Faulty) -> None:
    """A job whose last attempt ended becomes one dead letter."""
    job = make_job(max_attempts=1, reply_to=faulty.listener.router)
    await faulty.sound.jobs.enqueue(job)
    worker = await Puller(faulty.broker).join()
    lease = await worker.claim_one()
    faulty.lose("release")
    await faulty.broker.attempts.release(lease, "the engine failed", counted=True)
    assert await faulty.sound.jobs.enqueue(job) is State.DEAD
    client = faulty.backend.client()
    assert await client.xlen(ShardKeys(0).dead) == 1
    await client.aclose()
    assert len(await faulty.listener.received()) == 1


async def test_cancel_of_a_waiting_job(faulty: Faulty) -> None:
    """It is removed once, one marker is sent, its budget returned once."""
    job = make_job(reply_to=faulty.listener.router)
    await faulty.sound.jobs.enqueue(job)
    faulty.lose("cancel")
    assert await faulty.broker.jobs.cancel(job.id, "gone") in (State.QUEUED, State.CANCELLED)
    assert len(await faulty.listener.received()) == 1
    assert (await faulty.sound.stats.job_counts()).events[(MODEL, Lane.INTERACTIVE, "cancelled")] == 1


async def test_cancel_of_a_job_only_while_it_waits(faulty: Faulty) -> None:
    """Taken back once; the repeat finds it cancelled, and its marker is there once."""
    job = make_job()
    await faulty.broker.jobs.enqueue(job)
    faulty.lose("cancel")
    assert await faulty.broker.jobs.cancel(job.id, "moved", if_queued=True) in (State.QUEUED, State.CANCELLED)
    assert (await faulty.sound.stats.job_counts()).events[(MODEL, Lane.INTERACTIVE, "cancelled")] == 1


async def test_cancel_of_a_running_job(faulty: Faulty) -> None:
    """Its worker is told once."""
    job = make_job()
    await faulty.sound.jobs.enqueue(job)
    worker = await Puller(faulty.sound).join()
    await worker.claim_one()
    faulty.lose("cancel")
    await faulty.broker.jobs.cancel(job.id, "gone")
    assert len(await worker.control_messages()) == 1


async def test_cancel_of_an_unknown_job(faulty: Faulty) -> None:
    """The late enqueue stays void."""
    job = make_job()
    faulty.lose("cancel")
    await faulty.broker.jobs.cancel(job.id, "gone")
    assert await faulty.sound.jobs.enqueue(job) is State.CANCELLED


async def test_reclaim(faulty: Faulty) -> None:
    """Each job waits again once and spends one attempt."""
    for _ in range(3):
        await faulty.sound.jobs.enqueue(make_job(reply_to=faulty.listener.router))
    worker = await Puller(faulty.sound).join()
    await worker.claim(3)
    faulty.lose("reclaim")
    assert await faulty.broker.maintenance.reclaim(worker.session_id) in (Reclaimed(requeued=3), Reclaimed())
    assert await faulty.counts() == (3, 0)
    assert len(await faulty.listener.received()) == 3
    leases = await (await Puller(faulty.sound).join()).claim(3)
    assert {(lease.attempt, lease.epoch) for lease in leases} == {(2, 2)}


async def test_expire(faulty: Faulty) -> None:
    """Jobs end once."""
    await faulty.sound.jobs.enqueue(make_job(ttl_ms=1, reply_to=faulty.listener.router))
    faulty.lose("expire")
    assert isinstance(await faulty.broker.maintenance.expire(), Expired)
    assert len(await faulty.listener.received()) == 1
    assert (await faulty.sound.stats.job_counts()).events[(MODEL, Lane.INTERACTIVE, "expired")] == 1


async def test_join_and_renew(faulty: Faulty) -> None:
    """A worker is in after a lost join, and a lost renewal only renews twice."""
    worker = Puller(faulty.broker)
    faulty.lose("join")
    await worker.join()
    faulty.lose("renew")
    await faulty.broker.workers.renew(worker.session_id)
    assert faulty.proxy.replies_lost == 2
    assert set(await faulty.sound.maintenance.renewal_counters()) == {worker.session_id}


async def test_hold(faulty: Faulty) -> None:
    """What a worker does not run is handed back once, unspent."""
    await faulty.sound.jobs.enqueue(make_job(reply_to=faulty.listener.router))
    worker = await Puller(faulty.broker).join()
    await worker.claim_one()
    faulty.lose("reconcile_leases")
    assert await faulty.broker.workers.reconcile_leases(0, worker.session_id, worker.seq, ()) == set()
    assert await faulty.counts() == (1, 0)
    assert len(await faulty.listener.received()) == 1
    assert (await worker.claim_one()).attempt == 1


async def test_raise_epoch(faulty: Faulty) -> None:
    """The epoch rises once: the Router expects the attempt that will come."""
    job = make_job()
    await faulty.sound.jobs.enqueue(job)
    faulty.lose("raise_epoch")
    standing = await faulty.broker.jobs.raise_epoch(job.id, 0)
    assert standing is not None
    assert (await (await Puller(faulty.sound).join()).claim_one()).epoch == standing.epoch


async def test_act_as_manager(faulty: Faulty) -> None:
    """The lease is taken once: the term does not run away."""
    faulty.lose("act_as_manager")
    assert await faulty.broker.fleet.acquire_leader_lease("manager-1", 5_000) == 1
    assert await faulty.sound.fleet.acquire_leader_lease("manager-2", 5_000) is None


async def test_leave(faulty: Faulty) -> None:
    """What was held is handed back once, unspent."""
    await faulty.sound.jobs.enqueue(make_job(max_attempts=1))
    worker = await Puller(faulty.broker).join()
    await worker.claim_one()
    faulty.lose("reclaim")
    await faulty.broker.workers.leave(worker.session_id)
    assert await faulty.counts() == (1, 0)
