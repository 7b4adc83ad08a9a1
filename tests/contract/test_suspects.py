"""Poison: a job that crashes engines is found out, and its neighbours finish."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from broker import Broker, Budgets, Reclaimed
from queue_schemas import JobId, Lease, MarkerKind, Outcome, Settled, State
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, ServerBackend, answer_frame, make_job, record_of

from .conftest import Listener

KEYS = ShardKeys(0)
REASON = "the engine ended with exit code 139"


async def enqueue(broker: Broker, n: int, **fields: Any) -> list[JobId]:
    """Put jobs on the queue; their ids."""
    jobs = [make_job(**fields) for _ in range(n)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    return [job.id for job in jobs]


async def attempts_of(client: Any, ids: Sequence[JobId]) -> list[int]:
    """Attempts charged so far, by job."""
    return [int((await record_of(client, KEYS.job(job_id)))["attempts"]) for job_id in ids]


async def pullers(broker: Broker, n: int) -> list[Puller]:
    """Workers that have joined."""
    return [await Puller(broker).join() for _ in range(n)]


async def crash(broker: Broker, leases: Sequence[Lease]) -> None:
    """The engine of a live worker crashes."""
    assert await broker.attempts.report_crash(leases, REASON) == [Settled.OK] * len(leases)


async def test_the_first_crash_is_charged_to_all(broker: Broker, worker: Puller, client: Any) -> None:
    """Nobody knows which of them did it. All wait again, each as a suspect."""
    ids = await enqueue(broker, 3)
    leases = await worker.claim(3)
    await crash(broker, leases)
    assert await attempts_of(client, ids) == [1, 1, 1]
    given = [await other.claim(3) for other in await pullers(broker, 2)]
    assert [[lease.suspect for lease in leases] for leases in given] == [[True], [True]]


async def test_a_later_crash_is_charged_to_suspects_only(broker: Broker, worker: Puller, client: Any) -> None:
    """Who ran beside a suspect goes free, once: from then on it is a suspect too."""
    (poison,) = await enqueue(broker, 1)
    await crash(broker, await worker.claim(1))
    neighbours = await enqueue(broker, 3)
    (other,) = await pullers(broker, 1)
    leases = await other.claim(4)
    assert [lease.suspect for lease in leases].count(True) == 1
    await crash(broker, leases)
    assert await attempts_of(client, [poison, *neighbours]) == [2, 0, 0, 0]
    assert await client.xlen(KEYS.suspects(MODEL, leases[0].job.lane)) == 4


async def test_a_worker_holds_one_suspect_at_a_time(broker: Broker, worker: Puller) -> None:
    """Beside it, it is given other work; when it has ended, the next one, without waiting for the sweep."""
    await enqueue(broker, 2)
    await crash(broker, await worker.claim(2))
    await enqueue(broker, 1)
    (other,) = await pullers(broker, 1)
    leases = await other.claim(3)
    assert sorted(lease.suspect for lease in leases) == [False, True]
    assert await other.claim(1) == []
    await other.control_messages()
    (suspect,) = [lease for lease in leases if lease.suspect]
    await broker.attempts.settle(suspect, Outcome.DONE, answer_frame(suspect))
    assert [message.kind.value for message in await other.control_messages(200)] == ["wake"]
    assert (await other.claim_one()).suspect


async def test_a_cleared_job_is_no_suspect(broker: Broker, worker: Puller, client: Any) -> None:
    """Its worker may hold the next one, and the next crash is not its own alone."""
    ids = await enqueue(broker, 2)
    await crash(broker, await worker.claim(2))
    (other,) = await pullers(broker, 1)
    first = await other.claim_one()
    assert await other.claim(1) == []
    await other.control_messages()
    assert await broker.attempts.clear_suspicion(first) is Settled.OK
    assert [message.kind.value for message in await other.control_messages(200)] == ["wake"]
    second = await other.claim_one()
    assert second.suspect
    await crash(broker, [first, second])
    charged = dict(zip(ids, await attempts_of(client, ids), strict=True))
    assert charged == {first.job.id: 1, second.job.id: 2}


async def claim_of(broker: Broker, puller: Puller, job_id: str) -> Lease:
    """The lease of one job; those claimed before it are handed back."""
    lease = await puller.claim_one()
    while lease.job.id != job_id:
        await broker.attempts.release(lease, "handed back", counted=False)
        lease = await puller.claim_one()
    return lease


async def test_no_suspect_is_released_twice(broker: Broker, worker: Puller, client: Any) -> None:
    """Poison that puts something out before it crashes is cleared, beside a suspect that is not: it is charged too."""
    poison, *_ = ids = await enqueue(broker, 4, max_attempts=5)
    await crash(broker, await worker.claim(4))
    (other,) = await pullers(broker, 1)
    lease = await claim_of(broker, other, poison)
    assert await broker.attempts.clear_suspicion(lease) is Settled.OK
    beside = await other.claim_one()
    assert beside.suspect
    await crash(broker, [lease, beside])
    assert (await attempts_of(client, ids))[0] == 1


async def test_no_suspect_is_cleared_twice(broker: Broker, worker: Puller, client: Any) -> None:
    """Poison that puts something out each time would be cleared each time, and take along who is under suspicion
    beside it: from its second crash on it is beside no other suspect, and they are not charged for it."""
    poison, *others = ids = await enqueue(broker, 4, max_attempts=5)
    await crash(broker, await worker.claim(4))
    first, *later = await pullers(broker, 3)
    lease = await claim_of(broker, first, poison)
    assert await broker.attempts.clear_suspicion(lease) is Settled.OK
    await crash(broker, [lease, await first.claim_one()])
    charged = sum(await attempts_of(client, others))
    for number, puller in enumerate(later, 2):
        lease = await claim_of(broker, puller, poison)
        assert lease.suspect
        assert await broker.attempts.clear_suspicion(lease) is Settled.OK
        assert await puller.claim(1) == []
        await crash(broker, [lease])
        assert await attempts_of(client, ids[:1]) == [number]
    assert sum(await attempts_of(client, others)) == charged


async def test_clearing_a_job_of_nothing_leaves_the_suspect_beside_it(broker: Broker, worker: Puller) -> None:
    """Its worker still holds one, and is given no other."""
    await enqueue(broker, 2)
    await crash(broker, await worker.claim(2))
    await enqueue(broker, 1)
    (other,) = await pullers(broker, 1)
    (plain,) = [lease for lease in await other.claim(3) if not lease.suspect]
    assert await broker.attempts.clear_suspicion(plain) is Settled.OK
    assert await other.claim(1) == []


async def test_a_repeated_clear_leaves_the_suspect_taken_since(broker: Broker, worker: Puller) -> None:
    """Its reply may have been lost, and its worker have claimed the next suspect meanwhile."""
    await enqueue(broker, 3)
    await crash(broker, await worker.claim(3))
    (other,) = await pullers(broker, 1)
    first = await other.claim_one()
    assert await broker.attempts.clear_suspicion(first) is Settled.OK
    assert (await other.claim_one()).suspect
    await other.control_messages()
    assert await broker.attempts.clear_suspicion(first) is Settled.OK
    assert await other.claim(1) == []
    assert await other.control_messages() == []


async def test_only_its_owner_clears_a_job(broker: Broker, worker: Puller) -> None:
    """A late call of a lost attempt clears nothing."""
    await enqueue(broker, 1)
    (lease,) = await worker.claim(1)
    await crash(broker, [lease])
    assert await broker.attempts.clear_suspicion(lease) is Settled.FENCED
    (other,) = await pullers(broker, 1)
    again = await other.claim_one()
    assert again.suspect
    await broker.attempts.settle(again, Outcome.DONE, answer_frame(again))
    assert await broker.attempts.clear_suspicion(again) is Settled.DUPLICATE


async def test_a_repeated_crash_report_changes_nothing(broker: Broker, worker: Puller, client: Any) -> None:
    """Its reply may have been lost."""
    ids = await enqueue(broker, 2)
    leases = await worker.claim(2)
    await crash(broker, leases)
    assert await broker.attempts.report_crash(leases, REASON) == [Settled.DUPLICATE] * 2
    assert await attempts_of(client, ids) == [1, 1]


async def test_poison_ends_as_a_dead_letter_and_its_neighbours_finish(
    broker: Broker, listener: Listener, client: Any
) -> None:
    """With two workers whose engines die of it: no neighbour is charged more than twice, poison starts three times."""
    poison, *neighbours = await enqueue(broker, 9, reply_to=listener.router)
    workers = await pullers(broker, 2)
    starts = dict.fromkeys((poison, *neighbours), 0)
    done: set[JobId] = set()
    for _ in range(60):
        for puller in workers:
            leases = await puller.claim(4)
            for lease in leases:
                starts[lease.job.id] += 1
            if any(lease.job.id == poison for lease in leases):
                await crash(broker, leases)
                continue
            for lease in leases:
                assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
                done.add(lease.job.id)
        if len(done) == 8 and starts[poison] == 3:
            break
        await asyncio.sleep(0.1)  # its last worker is avoided for two seconds
    assert done == set(neighbours)
    assert starts[poison] == 3
    assert max(starts[job_id] for job_id in neighbours) <= 3
    assert await client.xlen(KEYS.dead) == 1
    assert await broker.jobs.cancel(poison, "asked") is State.DEAD


async def test_a_worker_that_dies_makes_suspects_only_the_second_time(broker: Broker, client: Any) -> None:
    """A machine that goes down says little of what ran there: its jobs start again side by side."""
    ids = await enqueue(broker, 3)
    first, second, third = await pullers(broker, 3)
    await first.claim(3)
    assert await broker.maintenance.reclaim(first.session_id) == Reclaimed(requeued=3)
    assert [lease.suspect for lease in await second.claim(3)] == [False] * 3
    await broker.maintenance.reclaim(second.session_id)
    assert await attempts_of(client, ids) == [2, 2, 2]
    assert [lease.suspect for lease in await third.claim(3)] == [True]


async def test_a_dead_workers_suspect_is_charged_alone(broker: Broker, worker: Puller, client: Any) -> None:
    """Also when the reclaim takes several calls; one that has finished before does not count."""
    (poison,) = await enqueue(broker, 1)
    await crash(broker, await worker.claim(1))
    neighbours = await enqueue(broker, 300)
    first, second = await pullers(broker, 2)
    assert len(await first.claim(301)) == 301
    await broker.maintenance.reclaim(first.session_id)
    assert await attempts_of(client, [poison, *neighbours]) == [2] + [0] * 300
    lease = await second.claim_one()
    assert lease.suspect
    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    others = await enqueue(broker, 2, model="another")
    assert len(await second.claim(2, models=["another"])) == 2
    await broker.maintenance.reclaim(second.session_id)
    assert await attempts_of(client, others) == [1, 1]


async def test_a_suspect_that_nobody_waits_for_is_dropped(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """As any other job."""
    await enqueue(broker, 1, reply_to=listener.router)
    await crash(broker, await worker.claim(1))
    await listener.expect_marker(MarkerKind.REQUEUED)
    await listener.leave()
    (other,) = await pullers(broker, 1)
    assert await other.claim() == []
    assert not await client.exists(KEYS.budget)


async def test_an_engine_may_crash_with_thousands_of_jobs(real_backend: ServerBackend) -> None:
    """All end in one call, and none stays leased: a server's Lua passes some 8000 arguments at once, no more."""
    many = 9_000
    broker, client = (
        await real_backend.connect(budgets=Budgets(tenant_jobs=many, pool_jobs=many)),
        real_backend.client(),
    )
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(many)))
    leases = await (await Puller(broker).join()).claim(many)
    assert len(leases) == many
    assert set(await broker.attempts.report_crash(leases, REASON)) == {Settled.OK}
    assert await client.keys("iq:*leases:*") == []
    await client.aclose()
    await broker.close()
