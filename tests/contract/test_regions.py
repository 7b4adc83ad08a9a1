"""Regions: a job's own region first, any other once it has waited for that, and no capacity wasted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from broker import Broker
from queue_schemas import (
    BANDS,
    LANES,
    Control,
    ControlKind,
    Job,
    Lane,
    LaneDepth,
    MarkerKind,
    Outcome,
    State,
    Tenant,
)
from queue_schemas.keys import META, ShardKeys
from queue_schemas.lanes import (
    LANE_CYCLE,
    REGIONAL_STARVATION_BOUND,
    band_order,
    lane_order,
    region_first,
)
from tests.support.queue import MODEL, Backend, Puller, live_counts, make_job

from .conftest import Listener

KEYS = ShardKeys(0)
WAKE = Control(ControlKind.WAKE)
LONG_MS = 60_000
"""A wait that outlasts any test."""


async def joined(broker: Broker, region: str) -> Puller:
    """A worker of ``region`` that has joined and is not parked."""
    return await Puller(broker, region=region).join()


async def parked(broker: Broker, region: str, **options: Any) -> Puller:
    """A worker of ``region`` that found nothing."""
    worker = await joined(broker, region)
    assert await worker.claim(**options) == []
    return worker


def job_of(region: str, remote_after_ms: int = LONG_MS, **fields: Any) -> Job:
    return make_job(region=region, remote_after_ms=remote_after_ms, **fields)


async def enqueue_all(broker: Broker, jobs: Iterable[Job]) -> None:
    """Enqueue in order: one batch keeps the order in which its items were given."""
    await asyncio.gather(*map(broker.jobs.enqueue, jobs))


async def claim_jobs(worker: Puller, n: int, step: int = 1) -> list[Job]:
    """``n`` jobs, ``step`` at a time."""
    jobs: list[Job] = []
    while len(jobs) < n:
        leases = await worker.claim(min(step, n - len(jobs)))
        assert leases, f"only {len(jobs)} of {n} jobs could be claimed"
        jobs += [lease.job for lease in leases]
    return jobs


async def sweep_until_woken(broker: Broker, worker: Puller, limit_s: float = 10.0) -> None:
    """Sweep as a Manager does, only faster, until the parked ``worker`` is woken."""
    async with asyncio.timeout(limit_s):
        while WAKE not in await worker.control_messages():
            await asyncio.sleep(0.02)
            await broker.maintenance.expire()


# Who may claim when


async def test_a_region_s_own_worker_claims_at_once_and_others_do_not(broker: Broker) -> None:
    """Neither a worker of another region nor one of none gets a job before it has waited."""
    await broker.jobs.enqueue(job := job_of("eu"))
    for region in ("us", ""):
        worker = await joined(broker, region)
        assert await worker.claim(4) == []
    await broker.maintenance.expire()
    assert (await (await joined(broker, "eu")).claim_one()).job == job


@pytest.mark.parametrize("region", ["us", ""])
async def test_a_sweep_offers_a_job_to_other_regions_once_it_has_waited(broker: Broker, region: str) -> None:
    """With no worker in its own region: not before ``remote_after_ms``, and with the next sweep after it."""
    worker = await parked(broker, region)
    await broker.jobs.enqueue(job := job_of("eu", remote_after_ms=150))
    assert (await broker.maintenance.expire()).woken == 0
    assert await worker.control_messages() == []
    assert await worker.claim() == []
    await sweep_until_woken(broker, worker)
    lease = await worker.claim_one()
    assert lease.job == job
    assert lease.waited_ms >= 150


@pytest.mark.parametrize("region", ["us", ""])
async def test_a_claim_that_comes_later_finds_what_a_sweep_has_opened(broker: Broker, region: str) -> None:
    """A worker whose slot is free then needs no wake."""
    worker = await joined(broker, region)
    await broker.jobs.enqueue(job := job_of("eu", remote_after_ms=50))
    assert await worker.claim() == []
    await asyncio.sleep(0.1)
    await broker.maintenance.expire()
    assert (await worker.claim_one()).job == job


@pytest.mark.parametrize("region", ["us", ""])
async def test_without_a_worker_of_its_region_a_job_wakes_any(broker: Broker, region: str) -> None:
    """A job that any worker may run at once waits for no sweep."""
    worker = await parked(broker, region)
    await broker.jobs.enqueue(job := job_of("eu", remote_after_ms=0))
    assert await worker.control_messages() == [WAKE]
    assert (await worker.claim_one()).job == job


@pytest.mark.parametrize("region", ["us", ""])
async def test_a_job_that_waits_for_no_region_may_be_claimed_by_any_at_once(broker: Broker, region: str) -> None:
    """A Router that knows of no worker in its region does not make its jobs wait for one."""
    worker = await joined(broker, region)
    await broker.jobs.enqueue(job := job_of("eu", remote_after_ms=0))
    assert (await worker.claim_one()).job == job


async def test_jobs_of_no_region_are_anybodys(broker: Broker) -> None:
    """As in a fabric without regions."""
    await enqueue_all(broker, jobs := [make_job() for _ in range(3)])
    workers = [await joined(broker, region) for region in ("", "eu", "us")]
    assert [(await worker.claim_one()).job for worker in workers] == jobs


async def test_a_worker_that_takes_no_others_runs_its_region_s_jobs_alone(broker: Broker) -> None:
    """Neither a job of no region, nor one of another, nor one of its own that is anybody's: it is not woken or handed
    one, and claims none."""
    worker = await Puller(broker, region="eu", others=False).join()
    assert await worker.claim(2, offer=2) == []
    lost, opened = job_of("eu"), job_of("eu", 1)
    await enqueue_all(broker, [make_job(), job_of("us"), job_of("us", 0), job_of("eu", 0)])
    assert await worker.control_messages() == []
    await broker.jobs.enqueue(lost)
    (lease,) = await worker.handed()
    assert lease.job == lost
    await broker.attempts.release(lease, "for a test", counted=False, avoid_ms=0)
    assert await worker.claim(2) == []
    await enqueue_all(broker, [opened])
    assert WAKE in await worker.control_messages(), "it waits for the region still"
    anybody = await joined(broker, "")
    assert len(await anybody.claim(8)) == 4
    await sweep_until_woken(broker, anybody)
    assert await worker.claim(2) == []
    await broker.jobs.enqueue(own := job_of("eu"))
    assert (await worker.claim_one()).job == own


async def test_the_order_of_places_is_that_of_the_contract(broker: Broker) -> None:
    """Lane by lane, what is of the worker's region and what is anybody's take turns as in ``lanes.region_first``."""
    turns = 4 * LANE_CYCLE
    await enqueue_all(
        broker,
        [
            job_of(region, wait_ms, lane=lane, tenant=region)
            for region, wait_ms in {"eu": LONG_MS, "us": 0}.items()
            for lane in LANES
            for _ in range(turns)
        ],
    )
    jobs = await claim_jobs(await joined(broker, "eu"), turns, step=7)
    expected = [(lane_order(turn)[0], "eu" if region_first(turn) else "us") for turn in range(turns)]
    assert [(job.lane, job.region) for job in jobs] == expected


async def test_a_lane_goes_before_the_distance(broker: Broker) -> None:
    """An eligible interactive job of another region goes before a local batch job."""
    worker = await joined(broker, "eu")
    await broker.jobs.enqueue(job_of("eu", lane=Lane.BATCH))
    await broker.jobs.enqueue(remote := job_of("us", remote_after_ms=0))
    assert (await worker.claim_one()).job == remote


async def test_a_saturated_region_does_not_starve_remote_jobs(broker: Broker) -> None:
    """While local work of every kind keeps coming, an eligible remote job of the last lane and band is claimed."""
    worker = await joined(broker, "eu")
    await broker.jobs.enqueue(eligible := job_of("us", remote_after_ms=0, lane=Lane.BATCH, band=BANDS - 1))
    claims = 0
    claimed = False
    while not claimed:
        await enqueue_all(broker, [job_of("eu", lane=lane, band=band) for lane in LANES for band in range(BANDS)])
        for lease in await worker.claim(12):
            claims += 1
            claimed = claimed or lease.job == eligible
            await broker.attempts.settle(lease, Outcome.DONE)
        assert claims <= REGIONAL_STARVATION_BOUND + 12


# Order and fairness


@pytest.mark.parametrize("region", ["eu", "us"])
async def test_a_tenants_jobs_keep_their_order(broker: Broker, region: str) -> None:
    """Within region, band and tenant: first in, first claimed, locally and remotely."""
    await enqueue_all(broker, jobs := [job_of("eu", remote_after_ms=0) for _ in range(20)])
    assert await claim_jobs(await joined(broker, region), 20, step=3) == jobs


@pytest.mark.parametrize("region", ["eu", "us"])
async def test_tenants_take_turns(broker: Broker, region: str) -> None:
    """Locally and remotely alike."""
    await enqueue_all(broker, [job_of("eu", remote_after_ms=0, tenant="big") for _ in range(20)])
    await enqueue_all(broker, [job_of("eu", remote_after_ms=0, tenant="small") for _ in range(5)])
    jobs = await claim_jobs(await joined(broker, region), 10)
    assert [job.tenant for job in jobs].count(Tenant("small")) == 5


@pytest.mark.parametrize("region", ["eu", "us"])
async def test_bands_keep_their_shares(broker: Broker, region: str) -> None:
    """Locally and remotely alike."""
    turns = 24
    await enqueue_all(
        broker, [job_of("eu", remote_after_ms=0, band=band) for band in range(BANDS) for _ in range(turns)]
    )
    jobs = await claim_jobs(await joined(broker, region), turns, step=5)
    assert [job.band for job in jobs] == [band_order(turn)[0] for turn in range(turns)]


async def test_a_head_that_is_not_eligible_does_not_hide_one_that_is(broker: Broker) -> None:
    """The least-served tenant's job is not eligible yet; another tenant's is, and is opened to all."""
    await broker.jobs.enqueue(job_of("eu", tenant="fresh"))
    await broker.jobs.enqueue(eligible := job_of("eu", remote_after_ms=1, tenant="eligible"))
    await asyncio.sleep(0.02)
    await broker.maintenance.expire()
    worker = await joined(broker, "us")
    assert [lease.job for lease in await worker.claim(3)] == [eligible]


async def test_one_sweep_opens_the_jobs_of_all_regions_in_their_order(broker: Broker) -> None:
    """However many regions there are; and a tenant's jobs of one region keep their order."""
    jobs = {region: [job_of(region, remote_after_ms=1) for _ in range(4)] for region in ("c", "a", "b")}
    await enqueue_all(broker, [job for of_region in jobs.values() for job in of_region])
    await asyncio.sleep(0.02)
    await broker.maintenance.expire()
    claimed = await claim_jobs(await joined(broker, "us"), 12, step=12)
    for region, of_region in jobs.items():
        assert [job for job in claimed if job.region == region] == of_region
    assert await broker.stats.depths() == {MODEL: {Lane.INTERACTIVE: LaneDepth(leased=12, arrivals_per_s=0.0)}}


async def test_one_sweep_opens_a_bounded_number_of_jobs(broker: Broker) -> None:
    """The next ones open the rest: no call of the server takes long."""
    keys = KEYS
    await enqueue_all(broker, [job_of("eu", remote_after_ms=1) for _ in range(5)])
    await asyncio.sleep(0.02)
    worker = await joined(broker, "us")
    opened = []
    for _ in range(3):
        await broker._caller.script("expire", keys.budget, keys.prefix, 2, 0)
        opened.append(len(await worker.claim(5)))
    assert opened == [2, 2, 1]


# Requeue and endings


@pytest.mark.parametrize("counted", [True, False])
async def test_work_handed_back_is_anybodys_at_once(broker: Broker, counted: bool) -> None:
    """A job that was started once does not wait for its region again."""
    await broker.jobs.enqueue(job := job_of("eu"))
    await broker.attempts.release(await (await joined(broker, "eu")).claim_one(), "draining", counted=counted)
    lease = await (await joined(broker, "us")).claim_one()
    assert (lease.job, lease.epoch) == (job, 2)


async def test_lost_work_is_anybodys_at_once(broker: Broker) -> None:
    """With the worker the region may be gone; whoever is idle is woken, wherever it stands."""
    await broker.jobs.enqueue(job := job_of("eu"))
    local = await joined(broker, "eu")
    await local.claim_one()
    remote = await parked(broker, "us")
    await broker.maintenance.reclaim(local.session_id)
    assert await remote.control_messages() == [WAKE]
    assert (await remote.claim_one()).job == job


async def test_waiting_jobs_end_as_others_do(broker: Broker, listener: Listener, client: Any) -> None:
    """Cancelled, expired by the sweep, expired at a claim: the counts agree and the Router hears."""
    cancelled = job_of("eu", reply_to=listener.router)
    swept, late = (job_of("eu", ttl_ms=5, reply_to=listener.router, tenant=tenant) for tenant in ("a", "b"))
    await enqueue_all(broker, [cancelled, swept])
    assert await broker.jobs.cancel(cancelled.id, "gone") is State.QUEUED
    await listener.expect_marker(MarkerKind.CANCELLED)
    await asyncio.sleep(0.02)
    assert (await broker.maintenance.expire()).expired == 1
    await listener.expect_marker(MarkerKind.EXPIRED)
    await broker.jobs.enqueue(late)
    await asyncio.sleep(0.02)
    assert await (await joined(broker, "eu")).claim(2) == []
    await listener.expect_marker(MarkerKind.EXPIRED)
    assert await broker.stats.depths() == {}
    totals = {
        event: count
        for (_, lane, event), count in (await broker.stats.job_counts()).events.items()
        if lane is Lane.INTERACTIVE
    }
    assert totals == {"enqueued": 3, "cancelled": 1, "expired": 2}
    assert not any(b"@" in field for field in await client.hkeys(KEYS.counters)), "counters grow with regions"
    assert not [key async for key in client.scan_iter(match=f"{KEYS.prefix}q:*")]


async def test_a_remote_claim_ends_what_is_not_to_be_run(broker: Broker, listener: Listener) -> None:
    """Orphans and late jobs of another region are cleaned up on the way to one that runs."""
    orphan, kept = job_of("eu", 0, reply_to=listener.router), job_of("eu", 0)
    await enqueue_all(broker, [orphan, job_of("eu", 0, ttl_ms=5), kept])
    await listener.leave()
    await asyncio.sleep(0.02)
    assert [lease.job for lease in await (await joined(broker, "us")).claim(3)] == [kept]
    assert await broker.jobs.enqueue(orphan) is State.CANCELLED


async def test_a_dead_letter_is_of_its_lane(broker: Broker, client: Any) -> None:
    """What is written of a job that used up its attempts does not depend on where it waited."""
    await broker.jobs.enqueue(job_of("eu", max_attempts=1))
    await broker.attempts.release(await (await joined(broker, "eu")).claim_one(), "broken", counted=True)
    ((_, letter),) = await client.xrange(KEYS.dead)
    assert letter[b"lane"] == b"interactive"
    assert (await broker.stats.job_counts()).events[MODEL, Lane.INTERACTIVE, "dead"] == 1


async def test_depths_add_the_regions_up(broker: Broker) -> None:
    """A lane's counts are of all its regions, with those waiting by region; what runs is of the lane."""
    await enqueue_all(broker, [job_of("eu"), job_of("eu"), job_of("a:b @c"), make_job()])
    await (await joined(broker, "eu")).claim(1)
    lanes = (await broker.stats.depths())[MODEL]
    assert set(lanes) == {Lane.INTERACTIVE}
    depth = lanes[Lane.INTERACTIVE]
    assert (depth.waiting, depth.leased, depth.by_region) == (3, 1, {"eu": 1, "a:b @c": 1})
    await (await joined(broker, "a:b @c")).claim(2)
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].by_region == {"eu": 1}


# Parking and waking


async def test_a_job_wakes_a_worker_of_its_region(broker: Broker) -> None:
    """Whoever parked first, a near one is woken for each job as long as there is one."""
    await parked(broker, "us")
    local_workers = [await parked(broker, "eu") for _ in range(2)]
    await broker.jobs.enqueue(job_of("eu"))
    assert sorted([len(await worker.control_messages()) for worker in local_workers]) == [0, 1]
    await broker.jobs.enqueue(job_of("eu"))
    await broker.jobs.enqueue(job_of("eu"))
    assert sum([len(await worker.control_messages()) for worker in local_workers]) == 1


async def test_a_job_of_no_region_wakes_a_worker_of_any(broker: Broker) -> None:
    """Workers of regions park apart, and are found."""
    remote = await parked(broker, "us")
    await broker.jobs.enqueue(make_job())
    assert await remote.control_messages() == [WAKE]


async def test_all_idle_workers_of_all_regions_are_woken_by_jobs_of_none(broker: Broker) -> None:
    """One after the other, until nobody sleeps."""
    workers = [await parked(broker, region) for region in ("", "eu", "us", "eu", "asia")]
    await enqueue_all(broker, [make_job() for _ in range(5)])
    assert [await worker.control_messages() for worker in workers] == [[WAKE]] * 5


async def test_no_worker_of_another_region_is_woken_before_a_job_has_waited(broker: Broker) -> None:
    """However many jobs come and however often the sweep does, those of other regions sleep on."""
    remote = [await parked(broker, region) for region in ("us", "asia", "")]
    for _ in range(5):
        await broker.jobs.enqueue(job_of("eu"))
        assert (await broker.maintenance.expire()).woken == 0
    assert [await worker.control_messages() for worker in remote] == [[], [], []]


async def test_the_first_job_to_have_waited_counts(broker: Broker) -> None:
    """Whichever came first: one that waits for less is offered earlier."""
    remote = await parked(broker, "us")
    await broker.jobs.enqueue(job_of("eu", tenant="slow"))
    await broker.jobs.enqueue(quick := job_of("eu", remote_after_ms=50, tenant="quick"))
    await sweep_until_woken(broker, remote)
    assert (await remote.claim_one()).job == quick


async def test_a_job_that_its_region_took_is_offered_to_nobody(broker: Broker) -> None:
    """No worker of another region is woken for what runs already, nor for what has not waited long enough."""
    remote, local = await parked(broker, "us"), await joined(broker, "eu")
    await broker.jobs.enqueue(job_of("eu", remote_after_ms=1))
    await local.claim_one()
    await broker.jobs.enqueue(job_of("eu"))
    await asyncio.sleep(0.02)
    assert (await broker.maintenance.expire()).woken == 0
    assert await remote.control_messages() == []


async def test_the_sweep_wakes_one_worker_for_what_it_opens(broker: Broker) -> None:
    """The one that parked first, of whichever region; one of its own was woken when it came."""
    local_workers = [await parked(broker, "eu") for _ in range(2)]
    remote_workers = [await parked(broker, "us") for _ in range(2)]
    await broker.jobs.enqueue(job_of("eu", remote_after_ms=1))
    told = [len(await worker.control_messages()) for worker in (*local_workers, *remote_workers)]
    assert (sum(told[:2]), sum(told[2:])) == (1, 0)
    await asyncio.sleep(0.05)
    assert (await broker.maintenance.expire()).woken == 1
    told = [len(await worker.control_messages()) for worker in (*local_workers, *remote_workers)]
    assert sum(told) == 1


async def test_a_dead_worker_of_another_region_is_made_up_for_by_the_next_sweep(broker: Broker) -> None:
    """Whoever was woken and does not claim keeps nobody from it."""
    remote_workers = [await parked(broker, "us") for _ in range(2)]
    await broker.jobs.enqueue(job := job_of("eu", remote_after_ms=1))
    await asyncio.sleep(0.05)
    woken = [(await broker.maintenance.expire()).woken for _ in range(2)]
    assert woken == [1, 1]
    assert [await worker.control_messages() for worker in remote_workers] == [[WAKE], [WAKE]]
    assert (await remote_workers[1].claim_one()).job == job


async def test_a_chain_of_wakes_empties_every_region(broker: Broker) -> None:
    """Workers of two regions that claim only when woken: a sweep starts a chain that leaves nothing that may be run."""
    workers = [await parked(broker, region) for region in ("us", "us", "asia")]
    jobs = [job_of("eu", remote_after_ms=wait, tenant=str(wait)) for wait in (0, 30, 60) for _ in range(4)]
    await enqueue_all(broker, [*jobs, make_job(), job_of("us"), job_of("asia")])
    taken: list[str] = []

    async def work(worker: Puller) -> None:
        while len(taken) < 15:
            if WAKE in await worker.control_messages(block_ms=100):
                while leases := await worker.claim(1):
                    taken.append(leases[0].job.id)

    async def sweep() -> None:
        while len(taken) < 15:
            await asyncio.sleep(0.1)
            await broker.maintenance.expire()

    async with asyncio.timeout(10):
        await asyncio.gather(sweep(), *map(work, workers))
    assert len(set(taken)) == 15


async def test_a_full_worker_wakes_the_next_for_what_is_left_elsewhere(broker: Broker) -> None:
    """One sweep is enough for all idle workers of other regions."""
    remote_workers = [await parked(broker, "us") for _ in range(3)]
    await enqueue_all(broker, [job_of("eu", remote_after_ms=1) for _ in range(3)])
    await asyncio.sleep(0.05)
    assert (await broker.maintenance.expire()).woken == 1
    for worker in remote_workers:
        assert await worker.control_messages() == [WAKE]
        await worker.claim_one()


# Repeats, bounds, what is left


async def test_a_worker_that_left_is_parked_nowhere(broker: Broker, client: Any) -> None:
    """Neither a leave nor a reclaim nor a full slot leaves a mark among the parked of a region."""
    workers = [await parked(broker, "eu") for _ in range(3)]
    assert await client.zcard(KEYS.parked(MODEL, Lane.INTERACTIVE, "eu")) == 3
    await broker.workers.leave(workers[0].session_id)
    await broker.maintenance.reclaim(workers[1].session_id)
    await broker.jobs.enqueue(job_of("eu"))
    await workers[2].claim_one()
    for lane in LANES:
        assert await client.zcard(KEYS.parked(MODEL, lane, "eu")) == 0


async def test_a_worker_of_many_models_finds_remote_jobs(broker: Broker) -> None:
    """As many models as a worker may serve, in all lanes, of a region: the call stays within Lua's bounds."""
    models = [f"model-{number}" for number in range(1_024)]
    await enqueue_all(broker, [job_of("eu", 0, model=models[7]), job_of("us", model=models[1_000])])
    worker = await joined(broker, "us")
    assert len(await worker.claim(3, models=models)) == 2


async def settled_keys(client: Any) -> tuple[set[str], set[str]]:
    """(keys that stay, keys that expire) now."""
    stay: set[str] = set()
    expire: set[str] = set()
    async for key in client.scan_iter(count=1_000):
        (expire if await client.pttl(key) > 0 else stay).add(key.decode())
    return stay, expire


async def test_a_drained_queue_leaves_only_counters(broker: Broker, client: Any) -> None:
    """After everything has ended and everybody has left, what regions needed expires, counters without regions stay."""
    before, _ = await settled_keys(client)
    workers = [await parked(broker, region) for region in ("eu", "us", "")]
    await enqueue_all(
        broker,
        [
            job_of(("eu", "us")[n % 2], (0, LONG_MS)[n % 4 // 2], tenant=f"t{n % 3}", band=n % BANDS, lane=LANES[n % 3])
            for n in range(48)
        ],
    )
    ended = 0
    while ended < 48:
        for worker in workers:
            for lease in await worker.claim(4):
                ended += 1
                await broker.attempts.settle(lease, Outcome.DONE)
    for worker in workers:
        assert await worker.claim(2) == []
        await broker.workers.leave(worker.session_id)
    stay, expire = await settled_keys(client)
    assert stay - before <= {KEYS.clock, KEYS.counters, META}
    families = {key.removeprefix(KEYS.prefix).split(":")[0] for key in expire}
    assert families <= {"job", "service"}
    assert not any(b"@" in field for field in await client.hkeys(KEYS.counters))
    assert live_counts(await client.hgetall(KEYS.counters)) == {}


async def test_every_key_is_one_of_the_contract(broker: Broker, client: Any) -> None:
    """The names that the scripts build are those of ``queue_schemas.keys``, for regions that need encoding too."""
    region, tenant = "eu: {west} @ü", "a:b"
    local, remote = await parked(broker, region), await parked(broker, "us")
    jobs = [job_of(region, wait, tenant=name) for wait in (1, LONG_MS) for name in (tenant, tenant, "rival", "rival")]
    await enqueue_all(broker, jobs)
    await asyncio.sleep(0.02)
    await broker.maintenance.expire()
    await local.claim(6, offer=6)
    await remote.claim(1)
    band = jobs[0].band
    allowed = {
        META,
        *(KEYS.queue(MODEL, Lane.INTERACTIVE, band, name, of) for name in (tenant, "rival") for of in (region, "")),
        *(key(MODEL, Lane.INTERACTIVE, band, of) for key in (KEYS.active, KEYS.service) for of in (region, "")),
        *(KEYS.job(job.id) for job in jobs),
        *(key(puller.session_id) for puller in (local, remote) for key in (KEYS.leases, KEYS.claimed, KEYS.control)),
        *(KEYS.parked(MODEL, lane, name) for lane in LANES for name in ("", region, "us")),
        *(
            KEYS.clock,
            KEYS.renewals,
            KEYS.deadlines,
            KEYS.heads,
            KEYS.budget,
            KEYS.counters,
            KEYS.arrivals,
        ),
    }
    stay, expire = await settled_keys(client)
    assert stay | expire <= allowed
    assert KEYS.service(MODEL, Lane.INTERACTIVE, band, region) in expire


async def test_without_regions_the_keys_are_what_they_were(backend: Backend, broker: Broker, client: Any) -> None:
    """Every key and every field of a fabric that names no region: builds that know none share its Redis."""
    worker = await Puller(broker).join()
    await enqueue_all(broker, jobs := [make_job(tenant=tenant) for tenant in ("a", "b", "a")])
    await worker.claim(1)
    lease = await worker.claim_one()
    await broker.attempts.release(lease, "draining", counted=False)
    assert len(await worker.claim(4)) == 2
    where = "sim%2Ftiny%3Av1:interactive"
    keys = {key.decode().removeprefix(KEYS.prefix) async for key in client.scan_iter(count=1_000)}
    if not backend.real:
        keys.add(META)  # written by the check of a real server
    assert keys == {
        META, "clock", "renewals", "budget", "deadlines", "counters", f"service:{where}:2",
        *(f"job:{job.id}" for job in jobs),
        *(f"{what}:{worker.session_id}" for what in ("leases", "claimed", "ctl")),
        *(f"parked:{where.replace('interactive', lane)}" for lane in LANES),
    }  # fmt: skip
    fields = {field.decode() for field in await client.hkeys(KEYS.job(jobs[0].id))}
    assert fields - {"handed_back"} == {"env", "record"}
    assert {field.decode() for field in await client.hkeys(KEYS.claimed(worker.session_id))} == {
        "seq", "jobs", "parked", "free", "cache", "slots", "capacity",
    }  # fmt: skip
    counted = {field.decode() for field in await client.hkeys(KEYS.counters)}
    assert counted == {f"{where}:{what}" for what in ("leased", "enqueued", "requeued", "affinity/none")}
    assert b"region" not in await client.hget(KEYS.job(jobs[0].id), "env")
    assert (await broker.stats.depths())[MODEL] == {Lane.INTERACTIVE: LaneDepth(leased=3)}
