"""Keys that a server evicted, or somebody deleted: the queue's counters come back to what is there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker
from queue_schemas import Lane, Outcome, Settled, State
from queue_schemas.keys import ShardKeys
from queue_schemas.lanes import BANDS
from tests.support.queue import MODEL, Puller, ServerBackend, answer_frame, live_counts, make_job

KEYS = ShardKeys(0)


async def audited(broker: Broker) -> int:
    """What whole rounds of the audit mend until one finds nothing."""
    mended, quiet = 0, 0
    for _ in range(200):
        auditor = broker.maintenance._auditor
        auditor._next = {shard: (0.0, cursor) for shard, (_, cursor) in auditor._next.items()}
        found = await auditor.audit_next_part(KEYS)
        mended, quiet = mended + found, 0 if found else quiet + 1
        if quiet == 8:
            return mended
    raise AssertionError("the audit does not come to an end")


async def counters(client: Any) -> dict[str, int]:
    """All counters of live jobs that are not zero."""
    budget = {name.decode(): int(value) for name, value in (await client.hgetall(KEYS.budget)).items() if int(value)}
    return budget | live_counts(await client.hgetall(KEYS.counters))


@pytest.mark.parametrize("number", [20, 600])
async def test_records_that_vanished_are_not_counted_for_ever(
    broker: Broker, worker: Puller, client: Any, number: int
) -> None:
    """[G6] Waiting and running jobs whose records were evicted are counted down to nothing, few or many."""
    jobs = [make_job(tenant=f"t{n % 5}", lane=Lane.BATCH) for n in range(number)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    await worker.claim(8)
    survivor = make_job(tenant="survivor")
    await broker.jobs.enqueue(survivor)
    await client.delete(*(KEYS.job(job.id) for job in jobs))
    assert await audited(broker) >= number
    depths = await broker.stats.depths()
    assert {lane: (depth.waiting, depth.leased) for lane, depth in depths[MODEL].items()} == {Lane.INTERACTIVE: (1, 0)}
    lease = await worker.claim_one()
    assert lease.job == survivor
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    assert await broker.stats.depths() == {}
    assert await counters(client) == {}
    assert await client.zcard(KEYS.deadlines) == 0


async def test_a_claim_counts_down_what_it_does_not_find(broker: Broker, worker: Puller, client: Any) -> None:
    """[G6] A worker that meets entries whose records are gone gives back what they counted for, at once."""
    jobs = [make_job(tenant="t") for _ in range(10)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    await client.delete(*(KEYS.job(job.id) for job in jobs))
    assert await worker.claim(4) == []
    assert await counters(client) == {}
    assert await broker.stats.depths() == {}


@pytest.mark.parametrize("lost", ["counters", "budget", "queue", "leases", "all counters"])
async def test_indexes_that_vanished_are_made_again(broker: Broker, worker: Puller, client: Any, lost: str) -> None:
    """[G6] Counters, streams or leases that were evicted come back from the records: every job ends, and nothing is
    left over."""
    jobs = [make_job(tenant=f"t{n % 3}") for n in range(12)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    running = await worker.claim(4)
    keys = {
        "counters": [KEYS.counters],
        "budget": [KEYS.budget],
        "queue": [key async for key in client.scan_iter(f"{KEYS.prefix.replace('{', '?').replace('}', '?')}q:*")],
        "leases": [KEYS.leases(worker.session_id)],
        "all counters": [KEYS.counters, KEYS.budget],
    }[lost]
    assert keys
    await client.delete(*keys)
    assert await audited(broker) > 0
    depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
    assert (depth.waiting, depth.leased) == (8, 4)
    await broker.maintenance.reclaim(worker.session_id)
    heir = await Puller(broker).join()
    ended = 0
    while leases := await heir.claim(4):
        for lease in leases:
            assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
            ended += 1
    assert ended == len(jobs)
    assert len(running) == 4
    assert await counters(client) == {}


async def test_what_waits_is_counted_in_a_shard_with_many_jobs(broker: Broker, worker: Puller, client: Any) -> None:
    """[G6] With too many live jobs to make all counters anew, what waits is still counted, and what it costs: workers
    claim by the one, waits are predicted by the other."""
    jobs = [make_job(tenant=f"t{n % 5}", lane=list(Lane)[n % 3], band=n % BANDS, cost_estimate=n) for n in range(1_200)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    right = {lane: (depth.waiting, depth.cost) for lane, depth in (await broker.stats.depths())[MODEL].items()}
    assert {waiting for waiting, _ in right.values()} == {400}
    await client.delete(KEYS.counters)
    assert await audited(broker) == 3 + 3 * BANDS
    repaired = {lane: (depth.waiting, depth.cost) for lane, depth in (await broker.stats.depths())[MODEL].items()}
    assert repaired == right
    cost = next(name for name in await client.hkeys(KEYS.counters) if name.endswith(b":1:cost"))
    await client.hincrby(KEYS.counters, cost, 77)
    assert await audited(broker) == 1
    assert len(await worker.claim(4)) == 4


async def test_the_cost_of_very_many_jobs_is_estimated(real_backend: ServerBackend) -> None:
    """[G6] Where more wait than one call reads, over more tenants than one call counted before: within a few percent,
    and only if what is known cannot be right."""
    broker, client = await real_backend.connect(), real_backend.client()
    try:
        for _ in range(10):
            jobs = [make_job(tenant=f"t{n % 600}", cost_estimate=100 + n % 7) for n in range(600)]
            await asyncio.gather(*map(broker.jobs.enqueue, jobs))
        right = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
        assert right.waiting == 6_000
        cost = next(name for name in await client.hkeys(KEYS.counters) if name.endswith(b":cost"))
        await client.hincrby(KEYS.counters, cost, 99)  # may be right
        assert await audited(broker) == 0
        await client.hset(KEYS.counters, cost.replace(b":2:", b":r:"), -1)  # beside a sum that may be right
        assert await audited(broker) >= 1
        assert b":r:cost" not in b" ".join(await client.hkeys(KEYS.counters))
        await client.hset(KEYS.counters, cost, 5_999)  # not of 6,000 jobs
        assert await audited(broker) == 1
        assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].cost == pytest.approx(right.cost, rel=0.05)
        await client.delete(KEYS.counters)
        assert await audited(broker) == 2
        repaired = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
        assert repaired.waiting == 6_000
        assert repaired.cost == pytest.approx(right.cost, rel=0.05)
    finally:
        await broker.close()
        await client.aclose()


async def test_persisted_jobs_do_not_keep_live_ones_from_being_counted(broker: Broker, client: Any) -> None:
    """[G6] However many finished jobs are kept: a waiting one that vanished whole is not counted for ever."""
    await client.zadd(KEYS.persisted, {f"job-{n}": 2**50 for n in range(1_200)})
    job = make_job(tenant="t")
    await broker.jobs.enqueue(job)
    await client.delete(KEYS.job(job.id), KEYS.queue(job.model, job.lane, job.band, job.tenant))
    assert await audited(broker) > 0
    assert await broker.stats.depths() == {}
    assert await counters(client) == {}


async def test_any_number_of_counters_is_repaired(broker: Broker, client: Any) -> None:
    """[G6] One call repairs more counters than Lua passes arguments."""
    for n in range(4):
        await client.hset(KEYS.budget, mapping={f"t:tenant-{n}-{k}:jobs": 1 for k in range(3_000)})
    jobs = [make_job(tenant=f"t{n}", model=f"m{n}", persisted=True, idempotency_key=f"k{n}") for n in range(900)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    before = {name: value for name, value in (await client.hgetall(KEYS.budget)).items() if b"t:tenant" not in name}
    await client.hdel(KEYS.budget, *before)
    assert await audited(broker) == 12_000 + len(before) == 12_000 + 5 * len(jobs)
    assert await client.hgetall(KEYS.budget) == before


async def test_an_audit_of_a_whole_queue_changes_nothing(broker: Broker, worker: Puller, client: Any) -> None:
    """[G6] Where nothing was lost nothing is mended, whatever waits, runs, waits again or is kept."""
    for n in range(30):
        stored: dict[str, Any] = {"persisted": True, "idempotency_key": f"k{n}"} if n % 3 == 0 else {}
        assert await broker.jobs.enqueue(make_job(tenant=f"t{n % 4}", lane=list(Lane)[n % 3], **stored)) is State.QUEUED
    leases = await worker.claim(9)
    await broker.attempts.release(leases[0], "draining", counted=False)
    await broker.attempts.report_crash(leases[1:3], "it crashed")
    await broker.attempts.settle(leases[3], Outcome.DONE, answer_frame(leases[3]))
    before = await counters(client)
    assert await audited(broker) == 0
    assert await counters(client) == before
