"""Predicted waits: the scripts say what ``scheduling.prediction`` says, and refuse who would wait too long."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from broker import Broker
from queue_schemas import Lane, Lease, Outcome, State, WaitTooLong
from queue_schemas.ids import encode_name
from queue_schemas.keys import ShardKeys
from queue_schemas.lanes import BANDS
from scheduling.prediction import KNOWN_JOBS, MAX_WAIT_MS, RETRIED, LaneState, Place, Rate, patience_ms, place_of
from tests.support.queue import MODEL, Puller, make_job

RUN_MS, COST = 1_000, 100
KEYS = ShardKeys(0)


@pytest.fixture
async def worker(broker: Broker) -> Puller:
    """A worker that pulls."""
    return await Puller(broker).join()


async def observed(broker: Broker, worker: Puller, jobs: int = KNOWN_JOBS, **fields: Any) -> Rate:
    """Jobs of COST that took RUN_MS each are served."""
    rate = Rate()
    for _ in range(jobs):
        await broker.jobs.enqueue(make_job(cost_estimate=COST, **fields))
        await broker.attempts.settle(await worker.claim_one(), Outcome.DONE, used=COST, run_ms=RUN_MS)
        rate = rate.observed(RUN_MS, COST, 1)
    return rate


async def running(broker: Broker, worker: Puller, jobs: int) -> list[Lease]:
    """Slots that are taken."""
    for _ in range(jobs):
        await broker.jobs.enqueue(make_job(cost_estimate=COST))
    leases = await worker.claim(jobs)
    assert len(leases) == jobs
    return leases


async def predicted(broker: Broker, patience: int | None = None, **fields: Any) -> int | None:
    """Puts a job on the queue: how long it is thought to wait."""
    found = await broker.jobs.start_enqueue(make_job(**({"cost_estimate": COST} | fields)), patience)
    assert found.state is State.QUEUED
    return found.predicted_ms


@pytest.mark.parametrize("seed", range(4))
async def test_the_scripts_predict_what_the_functions_predict(broker: Broker, worker: Puller, seed: int) -> None:
    """For jobs of any lane, tenant and cost, one by one, and for each while it waits."""
    dice = random.Random(seed)
    rate = await observed(broker, worker, KNOWN_JOBS + 70)
    slots = dice.randint(1, 4)
    await running(broker, worker, slots)
    lanes = {lane: LaneState() for lane in Lane} | {Lane.INTERACTIVE: LaneState(leased=slots, rate=rate)}
    own: dict[tuple[Lane, int, str], int] = {}
    jobs, places = [], []
    for _ in range(40):
        lane, tenant, cost = dice.choice(list(Lane)), dice.choice("abc"), dice.randint(1, 5_000)
        band = dice.randrange(BANDS)
        tenants = len({name for *at, name in own if at == [lane, band]})
        place = place_of(lanes, lane, band, own.get((lane, band, tenant), 0), tenants)
        job = make_job(lane=lane, band=band, tenant=tenant, cost_estimate=cost)
        assert (await broker.jobs.start_enqueue(job)).predicted_ms == place.wait_ms
        own[lane, band, tenant] = own.get((lane, band, tenant), 0) + 1
        state = lanes[lane]
        costs = tuple(was + cost * (one == band) for one, was in enumerate(state.costs, RETRIED))
        lanes[lane] = LaneState(state.waiting + 1, costs, state.leased, state.rate)
        jobs.append((job, own[lane, band, tenant] - 1))
    for job, before in jobs:
        tenants = len({name for *at, name in own if at == [job.lane, job.band]})
        places.append(place_of(lanes, job.lane, job.band, before, tenants))
    assert await broker.jobs.places([job.id for job, _ in jobs]) == places


async def test_retried_jobs_go_before_a_job(broker: Broker, worker: Puller) -> None:
    """But for every fourth turn; each of them waits for those that were retried before it."""
    rate = await observed(broker, worker)
    leases = await running(broker, worker, 6)
    for lease in leases[:4]:
        await broker.attempts.release(lease, "its engine failed", counted=False)
    fresh = make_job(band=0, cost_estimate=COST)
    enqueued = await broker.jobs.start_enqueue(fresh)
    state = LaneState(4, (4 * COST, 0, 0, 0, 0), 2, rate)
    place = place_of({Lane.INTERACTIVE: state}, Lane.INTERACTIVE, 0, 0, 0)
    assert (enqueued.predicted_ms, place.jobs_ahead) == (place.wait_ms, 3)
    (second,) = await broker.jobs.places([leases[1].job.id])
    assert second is not None
    assert second.jobs_ahead == 1


async def test_counters_that_cannot_be_are_not_believed(broker: Broker, worker: Puller, client: Any) -> None:
    """As some writes may be lost: nothing is predicted below nothing, and scripts and functions agree."""
    rate = await observed(broker, worker)
    await running(broker, worker, 2)
    for band in range(3):
        await predicted(broker, band=band)
    for band, cost in ((0, -50), (1, 20)):
        await client.hset(KEYS.counters, f"{encode_name(MODEL)}:interactive:{band}:cost", cost)
    state = LaneState(3, (0, -50, 20, COST, 0), 2, rate)
    assert await predicted(broker, band=2) == place_of({Lane.INTERACTIVE: state}, Lane.INTERACTIVE, 2, 1, 1).wait_ms
    depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
    assert depth.cost == 20 + 2 * COST
    assert depth.predicted_wait_ms is not None
    assert depth.predicted_wait_ms > 0


async def test_nothing_is_predicted_from_few_jobs(broker: Broker, worker: Puller) -> None:
    """And nothing is refused then, however long the line and short the patience."""
    await observed(broker, worker, KNOWN_JOBS - 1)
    await running(broker, worker, 1)
    assert [await predicted(broker, patience=1) for _ in range(50)] == [None] * 50


async def test_without_workers_nothing_is_predicted_or_refused(broker: Broker, worker: Puller) -> None:
    """Whoever comes may find a worker that starts: the queue cannot know."""
    await observed(broker, worker)
    await broker.workers.leave(worker.session_id)
    assert [await predicted(broker, patience=1) for _ in range(50)] == [None] * 50


async def test_who_would_wait_too_long_is_refused_at_once(broker: Broker, worker: Puller, client: Any) -> None:
    """With when to come back, and nothing is left behind; a longer deadline is taken in."""
    await observed(broker, worker)
    await running(broker, worker, 2)
    for _ in range(10):
        await predicted(broker)
    before = {key: await client.type(key) for key in await client.keys("*")}
    with pytest.raises(WaitTooLong) as refused:
        await predicted(broker, patience=2_000)
    assert {key: await client.type(key) for key in await client.keys("*")} == before
    assert refused.value.details == {"predicted_wait_ms": (10 * RUN_MS + RUN_MS // 2) // 2}
    assert refused.value.retry_after_s == 4
    assert await predicted(broker, patience=5_250) == 5_250


async def test_who_may_not_wait_is_refused_unless_a_slot_is_free(broker: Broker, worker: Puller) -> None:
    """Also before anything is known of the pool; a large request is taken in where a worker offers a slot."""
    with pytest.raises(WaitTooLong) as refused:
        await predicted(broker, patience=0)
    assert refused.value.details == {}
    assert await worker.claim(1, offer=2) == []
    assert await predicted(broker, patience=0) is None
    assert len(await worker.handed()) == 1
    assert await predicted(broker, patience=0, body=b"x" * 300_000) is None
    with pytest.raises(WaitTooLong):
        await predicted(broker, patience=0)


async def test_a_worker_that_offers_nothing_has_a_free_slot_all_the_same(broker: Broker, worker: Puller) -> None:
    """One that serves several shards offers none, and waits to be woken: nobody is refused or told to wait, until it
    is on its way."""
    await observed(broker, worker)
    await running(broker, worker, 1)
    for patience in (0, 1):
        assert await worker.claim(1) == []
        assert await predicted(broker, patience) is None
        with pytest.raises(WaitTooLong):
            await predicted(broker, patience)
        assert len(await worker.claim(1)) == 1


async def test_a_place_far_behind_is_told_by_when_it_came(broker: Broker, client: Any) -> None:
    """Roughly, and at a cost that does not grow with the queue."""
    jobs = [make_job() for _ in range(300)]
    for job in jobs:
        await broker.jobs.enqueue(job)
        await asyncio.sleep(0.001)
    told = [place.jobs_ahead for job in jobs if (place := (await broker.jobs.places([job.id]))[0]) is not None]
    assert told[:32] == list(range(32))
    assert all(abs(place - ahead) < 60 for ahead, place in enumerate(told) if place is not None)
    assert (told[-1], len(told)) == (299, 300)


async def test_an_endless_wait_is_told_as_a_number(broker: Broker, worker: Puller) -> None:
    """Scripts say numbers beyond 10^14 in another form, which would end the calls of all who wait."""
    for _ in range(KNOWN_JOBS):
        await broker.jobs.enqueue(make_job(cost_estimate=1))
        await broker.attempts.settle(await worker.claim_one(), Outcome.DONE, run_ms=3_600_000)
    await running(broker, worker, 1)
    for _ in range(20):
        told = await predicted(broker, cost_estimate=30_000_000)
    assert told == MAX_WAIT_MS
    with pytest.raises(WaitTooLong) as refused:
        await predicted(broker, patience=1_000)
    assert refused.value.retry_after_s == 3_600


async def test_a_repeated_call_is_not_refused(broker: Broker, worker: Puller) -> None:
    """What is on the queue already stays there, whatever is predicted by now."""
    await observed(broker, worker)
    await running(broker, worker, 1)
    job = make_job(cost_estimate=COST)
    await broker.jobs.start_enqueue(job, 60_000)
    for _ in range(20):
        await predicted(broker)
    assert (await broker.jobs.start_enqueue(job, 1)).state is State.QUEUED


async def test_expired_jobs_make_nobody_wait(broker: Broker, worker: Puller) -> None:
    """A queue of them is predicted to take its time only until they are swept."""
    await observed(broker, worker)
    await running(broker, worker, 1)
    for _ in range(100):
        await broker.jobs.enqueue(make_job(cost_estimate=COST, ttl_ms=30))
    with pytest.raises(WaitTooLong):
        await predicted(broker, patience=50 * RUN_MS)
    await asyncio.sleep(0.05)
    await broker.maintenance.expire()
    assert await predicted(broker, patience=50 * RUN_MS) == RUN_MS // 2


async def test_a_worker_that_stalls_predicts_nothing_once_it_is_dead(broker: Broker, worker: Puller) -> None:
    """While its jobs count as running its slots do; nothing is refused because of them afterwards."""
    await observed(broker, worker)
    stalled = await Puller(broker).join()
    await running(broker, stalled, 3)
    assert await predicted(broker) == RUN_MS // 2 // 3
    await broker.maintenance.reclaim(stalled.session_id)
    assert await predicted(broker, patience=1) is None


@pytest.mark.parametrize(("used", "run_ms"), [(-5, -5), (10**18, 10**18), (None, None), (0, 0)])
async def test_absurd_figures_do_no_harm(broker: Broker, worker: Puller, used: int | None, run_ms: int | None) -> None:
    """Of a worker whose engine or clock is mad: predictions stay numbers, tenants stay served."""
    await observed(broker, worker, 4)
    for _ in range(4):
        await broker.jobs.enqueue(make_job(tenant="mad", cost_estimate=COST))
        await broker.attempts.settle(await worker.claim_one(), Outcome.DONE, used=used, run_ms=run_ms)
    await running(broker, worker, 1)
    for tenant in ("mad", "acme") * 3:
        told = await predicted(broker, tenant=tenant)
        assert told is None or 0 <= told < 10**12
    assert {lease.job.tenant for lease in await worker.claim(6)} == {"mad", "acme"}


async def test_depths_say_what_waits_costs_and_how_long_it_takes(broker: Broker, worker: Puller) -> None:
    await observed(broker, worker)
    await running(broker, worker, 2)
    for _ in range(4):
        await predicted(broker)
    depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
    assert (depth.cost, depth.ms_per_cost, depth.predicted_wait_ms) == (4 * COST, 10.0, 2_250)


async def test_a_worker_is_told_what_was_predicted(broker: Broker, worker: Puller) -> None:
    """So that it can measure the error; of one that did not wait nothing was."""
    await observed(broker, worker)
    await running(broker, worker, 1)
    await predicted(broker)
    assert (await worker.claim_one()).predicted_ms == RUN_MS // 2
    assert await worker.claim(1, offer=1) == []
    await predicted(broker)
    assert [lease.predicted_ms for lease in await worker.handed()] == [None]


async def test_what_does_not_wait_has_no_place(broker: Broker, worker: Puller) -> None:
    """Neither what runs nor what has ended; what waits again has one."""
    await observed(broker, worker)
    (lease,) = await running(broker, worker, 1)
    assert await broker.jobs.places([lease.job.id, make_job().id]) == [None, None]
    await broker.attempts.release(lease, "it drains", counted=False)
    assert await broker.jobs.places([lease.job.id]) == [Place(0, None)]


def test_a_margin_forgives_the_prediction() -> None:
    assert patience_ms(1_000, 0) == 1_000
    assert patience_ms(1_500, 0.25) == 2_000
