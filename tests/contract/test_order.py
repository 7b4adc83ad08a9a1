"""The order of claims: first come first served for a tenant, turns between tenants, shares between lanes."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from broker import Broker
from queue_schemas import BANDS, DEFAULT_BAND, LANES, Job, Lane, Outcome, ShardKeys, Tenant
from queue_schemas.lanes import STARVATION_BOUND, band_order, lane_order
from tests.support.queue import MODEL, Puller, ServerBackend, make_job

from .conftest import Connect

KEYS = ShardKeys(0)


async def enqueue_all(broker: Broker, jobs: list[Job]) -> None:
    """Enqueue in order: one batch keeps the order in which its items were given."""
    await asyncio.gather(*map(broker.jobs.enqueue, jobs))


async def claim_all(worker: Puller, n: int, *, step: int = 1, **options: object) -> list[Job]:
    """``n`` jobs, ``step`` at a time."""
    jobs: list[Job] = []
    while len(jobs) < n:
        leases = await worker.claim(min(step, n - len(jobs)), **options)  # type: ignore[arg-type]
        assert leases, f"only {len(jobs)} of {n} jobs could be claimed"
        jobs += [lease.job for lease in leases]
    return jobs


@pytest.mark.parametrize("step", [1, 7])
async def test_a_tenants_jobs_are_claimed_in_the_order_they_came(broker: Broker, worker: Puller, step: int) -> None:
    """Within lane, band and tenant: first in, first claimed, one at a time or several."""
    jobs = [make_job() for _ in range(30)]
    await enqueue_all(broker, jobs)
    assert await claim_all(worker, 30, step=step) == jobs


async def test_tenants_take_turns(broker: Broker, worker: Puller) -> None:
    """A tenant with many waiting jobs does not hold up one with few."""
    await enqueue_all(broker, [make_job(tenant="big") for _ in range(20)])
    await enqueue_all(broker, [make_job(tenant=tenant) for tenant in ("small", "tiny") for _ in range(3)])
    first = Counter(job.tenant for job in await claim_all(worker, 9))
    assert first == {"big": 3, "small": 3, "tiny": 3}


async def test_leaving_and_returning_gains_nothing(broker: Broker, worker: Puller) -> None:
    """A tenant that enqueues one job whenever its last was claimed gets no more turns than one that keeps a queue."""
    await enqueue_all(broker, [make_job(tenant="patient") for _ in range(40)])
    await broker.jobs.enqueue(make_job(tenant="trickster"))
    claimed: Counter[str] = Counter()
    for _ in range(20):
        job = (await worker.claim_one()).job
        claimed[job.tenant] += 1
        if job.tenant == "trickster":
            await broker.jobs.enqueue(make_job(tenant="trickster"))
    assert claimed["trickster"] <= 10


async def test_a_newcomer_does_not_catch_up_for_time_it_was_away(broker: Broker, worker: Puller) -> None:
    """A tenant that comes after others were served shares from now on; it does not get the past's turns."""
    await enqueue_all(broker, [make_job(tenant="old") for _ in range(40)])
    await claim_all(worker, 20)
    await enqueue_all(broker, [make_job(tenant="new") for _ in range(20)])
    assert [job.tenant for job in await claim_all(worker, 10)].count(Tenant("new")) <= 6


async def test_bands_go_in_the_order_of_the_contract(broker: Broker, worker: Puller) -> None:
    """The script's order of bands is ``lanes.band_order``, turn by turn."""
    turns = 48
    await enqueue_all(broker, [make_job(band=band) for band in range(BANDS) for _ in range(turns)])
    claimed = [job.band for job in await claim_all(worker, turns, step=5)]
    assert claimed == [band_order(turn)[0] for turn in range(turns)]


async def test_an_empty_band_gives_its_turn_to_the_next(broker: Broker, worker: Puller) -> None:
    """Shares are of what waits: with two bands waiting, the order skips the empty ones."""
    turns = 32
    await enqueue_all(broker, [make_job(band=band) for band in (1, 3) for _ in range(turns)])
    expected = [next(band for band in band_order(turn) if band in (1, 3)) for turn in range(turns)]
    assert [job.band for job in await claim_all(worker, turns)] == expected


async def test_lanes_go_in_the_order_of_the_contract(broker: Broker, worker: Puller) -> None:
    """The script's order of lanes is ``lanes.lane_order``, job by job, also within one claim."""
    turns = 48
    await enqueue_all(broker, [make_job(lane=lane) for lane in LANES for _ in range(turns)])
    claimed = [job.lane for job in await claim_all(worker, turns, step=5)]
    assert claimed == [lane_order(turn)[0] for turn in range(turns)]


async def test_no_head_of_any_lane_or_band_starves(broker: Broker, worker: Puller) -> None:
    """While urgent work keeps coming, a job of the last band of the last lane is claimed within the bound."""
    patient = make_job(lane=Lane.BATCH, band=BANDS - 1)
    await broker.jobs.enqueue(patient)
    claims = 0
    claimed = None
    while claimed != patient:
        need = [make_job(lane=lane, band=band) for lane in LANES for band in range(BANDS - 1)]
        await enqueue_all(broker, need)
        for lease in await worker.claim(16):
            claims += 1
            claimed = lease.job if claimed != patient else claimed
            await broker.attempts.settle(lease, Outcome.DONE)
        assert claims <= STARVATION_BOUND + 16


async def test_only_asked_lanes_are_claimed(broker: Broker, worker: Puller) -> None:
    """A worker that pulls one lane leaves the others alone."""
    await enqueue_all(broker, [make_job(lane=lane) for lane in LANES])
    jobs = [lease.job.lane for lease in await worker.claim(5, lanes=[Lane.BATCH])]
    assert jobs == [Lane.BATCH]


async def test_pools_take_turns(broker: Broker, worker: Puller) -> None:
    """A worker of two models serves both while both have work."""
    await enqueue_all(broker, [make_job(model=model) for model in ("a", "b") for _ in range(10)])
    jobs = await claim_all(worker, 10, models=("a", "b"))
    assert Counter(job.model for job in jobs) == {"a": 5, "b": 5}


async def test_only_asked_pools_are_claimed(broker: Broker, worker: Puller) -> None:
    """A job is run only by a worker that serves its model."""
    await enqueue_all(broker, [make_job(model="a"), make_job(model="b")])
    assert [lease.job.model for lease in await worker.claim(5, models=("b", "never-heard-of"))] == ["b"]


async def test_lost_work_goes_before_new_work(broker: Broker, worker: Puller) -> None:
    """A job handed back is claimed before those that never started, ahead even of the first band."""
    first = make_job(band=3)
    await broker.jobs.enqueue(first)
    await broker.attempts.release(await worker.claim_one(), "draining", counted=False)
    await enqueue_all(broker, [make_job(band=0) for _ in range(5)])
    assert (await worker.claim_one()).job == first


async def test_lost_work_leaves_new_work_a_share(broker: Broker, worker: Puller) -> None:
    """However much was lost, every fourth job of a lane is a new one."""
    await enqueue_all(broker, [make_job(tenant="lost") for _ in range(24)])
    for lease in await worker.claim(24):
        await broker.attempts.release(lease, "draining", counted=False)
    await enqueue_all(broker, [make_job(tenant="new") for _ in range(24)])
    assert Counter(job.tenant for job in await claim_all(worker, 24)) == {"lost": 18, "new": 6}


async def test_lost_work_of_one_lane_does_not_overtake_another(broker: Broker, worker: Puller) -> None:
    """A lost batch job waits at the head of its own lane, behind interactive work."""
    await broker.jobs.enqueue(make_job(lane=Lane.BATCH))
    await broker.attempts.release(await worker.claim_one(), "draining", counted=False)
    await broker.jobs.enqueue(make_job(lane=Lane.INTERACTIVE))
    assert (await worker.claim_one()).job.lane is Lane.INTERACTIVE


async def test_lost_work_keeps_its_order(broker: Broker, worker: Puller) -> None:
    """Jobs handed back in order are claimed again in that order."""
    jobs = [make_job() for _ in range(6)]
    await enqueue_all(broker, jobs)
    for lease in await worker.claim(6):
        await broker.attempts.release(lease, "draining", counted=False)
    again = await claim_all(worker, 6)
    assert again == jobs


async def test_a_depth_names_the_longest_wait(broker: Broker, worker: Puller) -> None:
    """Waiting, leased and the oldest age per pool and lane are what the streams hold; the age is the sweep's."""
    await enqueue_all(broker, [make_job() for _ in range(3)])
    await broker.jobs.enqueue(make_job(lane=Lane.BATCH, tenant="other"))
    await worker.claim(1)
    await asyncio.sleep(0.02)
    await broker.maintenance.expire()
    depths = await broker.stats.depths()
    assert (depths[MODEL][Lane.INTERACTIVE].waiting, depths[MODEL][Lane.INTERACTIVE].leased) == (2, 1)
    assert (depths[MODEL][Lane.BATCH].waiting, depths[MODEL][Lane.BATCH].leased) == (1, 0)
    assert 20 <= depths[MODEL][Lane.BATCH].oldest_age_ms < 10_000


async def test_the_longest_wait_of_many_tenants_is_found_in_a_round_of_sweeps(
    broker: Broker, worker: Puller, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweep looks at a part of the tenants and of the queue keys. Until a round is whole the last one counts, in
    the first round what was seen so far; what nobody waits for is not kept."""
    monkeypatch.setattr("broker.operations.stats.MAX_HEADS", 20)
    monkeypatch.setattr("broker.operations.stats.MAX_KEYS", 2)
    await broker.jobs.enqueue(make_job(tenant="first", ttl_ms=50_000))
    await asyncio.sleep(0.3)
    # Who was served more stands behind the others: the oldest job is looked at last.
    await client.zadd(KEYS.active(MODEL, Lane.INTERACTIVE, DEFAULT_BAND), {"first": 1e9})
    await enqueue_all(broker, [make_job(tenant=f"t{n}") for n in range(30)])
    await client.zadd(KEYS.active(MODEL, Lane.INTERACTIVE, DEFAULT_BAND), {f"t{n}": n for n in range(30)})
    for lane in (Lane.BACKGROUND, Lane.BATCH):
        await broker.jobs.enqueue(make_job(lane=lane, tenant="other"))
    ages = []
    for _ in range(9):
        await broker.maintenance.expire()
        lanes = (await broker.stats.depths())[MODEL]
        ages.append(lanes[Lane.INTERACTIVE].oldest_age_ms >= 300)
    assert 2 <= ages.index(True) <= 5
    assert all(ages[ages.index(True) :])
    assert {lane: depth.deadline_ms is not None for lane, depth in lanes.items()} == dict.fromkeys(Lane, True)
    assert (lanes[Lane.INTERACTIVE].deadline_ms or 0) < 50_000
    for _ in range(33):
        await worker.claim(1)
    await broker.maintenance.expire()
    assert await client.hgetall(KEYS.heads) == {}


async def test_a_new_sweeper_forgets_what_the_last_one_noted(
    broker: Broker, worker: Puller, client: Any, connect: Connect
) -> None:
    """It may have been replaced before the jobs ended."""
    await broker.jobs.enqueue(make_job())
    await broker.maintenance.expire()
    assert len(await client.hkeys(KEYS.heads)) == 1
    await worker.claim(1)
    await (await connect()).maintenance.expire()
    assert await client.hkeys(KEYS.heads) == []


async def test_reading_depths_looks_at_no_tenant(real_backend: ServerBackend) -> None:
    """It runs as many commands for a thousand waiting tenants as for one: strangers ask for it."""
    broker, client = await real_backend.connect(), real_backend.client()
    try:
        counts = []
        for tenants in (range(1), range(1, 1_000)):
            await asyncio.gather(*(broker.jobs.enqueue(make_job(tenant=f"t{n}")) for n in tenants))
            await broker.maintenance.expire()
            await client.config_resetstat()
            assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == tenants.stop
            stats = await client.info("commandstats")
            counts.append({name: one["calls"] for name, one in stats.items() if "config" not in name})
        assert counts[0] == counts[1]
    finally:
        await broker.close()
        await client.aclose()


async def test_a_newcomer_waits_its_turn_also_after_the_clock_was_forgotten(
    broker: Broker, worker: Puller, client: Any
) -> None:
    """When a band had no competition for an hour its clock is gone: a newcomer starts beside those who wait."""
    for tenant in ("a", "b") * 10:
        await broker.jobs.enqueue(make_job(tenant=tenant))
    await worker.claim(10)
    await client.delete(ShardKeys(0).service(MODEL, Lane.INTERACTIVE, DEFAULT_BAND))
    for _ in range(10):
        await broker.jobs.enqueue(make_job(tenant="c"))
    first = [lease.job.tenant for lease in await worker.claim(6)]
    assert first.count(Tenant("c")) <= 3, first
