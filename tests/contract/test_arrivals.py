"""How fast jobs come and are served, as the queue notes it: the same whoever sweeps, and whatever its clock does."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from broker import Broker
from queue_schemas import Lane, Outcome
from queue_schemas.keys import ShardKeys, queue_key
from scheduling.arrivals import LOOK_MS, STALE_MS, WINDOW_MS, Arrivals
from scheduling.prediction import RATE_JOBS, Rate
from tests.support.queue import MODEL, Puller, make_job, record_of

from .conftest import Connect

KEYS = ShardKeys(0)
LANE = queue_key(MODEL, Lane.INTERACTIVE)
SECOND_MS = 1_000


async def come(broker: Broker, jobs: int, lane: Lane = Lane.INTERACTIVE, **fields: Any) -> None:
    """So many jobs come, at once."""
    await asyncio.gather(*(broker.jobs.enqueue(make_job(lane=lane, **fields)) for _ in range(jobs)))


async def pass_time(client: Any, ms: int) -> None:
    """The queue's clock goes on by so much, beside what passes by itself."""
    server_ms, queue_ms = map(int, (await client.get(KEYS.clock)).split())
    await client.set(KEYS.clock, f"{server_ms} {queue_ms + ms}")


async def look(broker: Broker, client: Any, ms: int = SECOND_MS) -> int:
    """A sweep, ``ms`` later; how long after the one before it looked, by what it noted."""
    before = int(await client.hget(KEYS.arrivals, "at") or 0)
    await pass_time(client, ms)
    await broker.maintenance.expire()
    return int(await client.hget(KEYS.arrivals, "at")) - before


async def noted(client: Any, lane: str = LANE) -> Arrivals:
    return Arrivals(*map(int, (await client.hget(KEYS.arrivals, lane)).split()))


async def per_s(broker: Broker, lane: Lane = Lane.INTERACTIVE) -> float | None:
    return (await broker.stats.depths())[MODEL][lane].arrivals_per_s


@pytest.mark.parametrize("seed", range(3))
async def test_the_sweep_notes_what_the_function_says(broker: Broker, client: Any, seed: int) -> None:
    """For each lane by itself, with looks near to each other and far apart."""
    dice = random.Random(seed)
    await come(broker, 3)
    await look(broker, client)
    expected, totals = {Lane.INTERACTIVE: await noted(client)}, {Lane.INTERACTIVE: 3}
    assert expected[Lane.INTERACTIVE].total == 3
    for _ in range(12):
        for lane in dice.sample(list(Lane), dice.randint(0, 3)):
            jobs = dice.randint(1, 40)
            await come(broker, jobs, lane)
            totals[lane] = totals.get(lane, 0) + jobs
        passed_ms = await look(broker, client, dice.choice((LOOK_MS, SECOND_MS, 7_000, 9_000)))
        for lane, total in totals.items():
            expected[lane] = expected.get(lane, Arrivals()).looked_at(total, passed_ms)
            assert await noted(client, queue_key(MODEL, lane)) == expected[lane]
            assert await per_s(broker, lane) == expected[lane].per_s


async def test_before_the_first_sweep_nothing_is_known(broker: Broker, client: Any) -> None:
    """Afterwards what came since, which may be nothing; jobs before the first sweep came at no known time."""
    await come(broker, 100)
    assert await per_s(broker) is None
    await broker.maintenance.expire()
    assert await per_s(broker) == 0.0
    await come(broker, 3, Lane.BATCH)
    assert await per_s(broker, Lane.BATCH) == 0.0
    passed_ms = await look(broker, client)
    assert await per_s(broker, Lane.BATCH) == pytest.approx(3_000 / (WINDOW_MS + passed_ms), abs=0.001)


async def test_arrivals_are_unknown_once_nobody_sweeps(broker: Broker, client: Any) -> None:
    """Any call moves the queue's clock on; the next sweeper counts what came meanwhile over all that time."""
    await come(broker, 1)
    await broker.maintenance.expire()
    for _ in range(30):
        await come(broker, 10)
        await look(broker, client)
    assert await per_s(broker) == pytest.approx(6.2, abs=0.5), "ten a second, for half a minute"
    await pass_time(client, STALE_MS + SECOND_MS)
    await come(broker, 1)
    assert await per_s(broker) is None
    passed_ms = await look(broker, client, 60_000)
    assert 71_000 <= passed_ms < 80_000
    assert await per_s(broker) == pytest.approx((6.2 * 30 + 1) / 100, abs=0.2)


async def test_a_sweeper_goes_on_where_the_last_one_ended(broker: Broker, client: Any, connect: Connect) -> None:
    """One that was killed with all that it knew: what came before counts as before."""
    await come(broker, 20)
    await broker.maintenance.expire()
    await come(broker, 20)
    await look(broker, client)
    before = await noted(client)
    await come(broker, 5)
    passed_ms = await look(await connect(), client)
    assert await noted(client) == before.looked_at(45, passed_ms)


async def test_two_sweepers_count_each_job_once(broker: Broker, client: Any, connect: Connect) -> None:
    """An acting Manager and one that does not know yet that it is not: the second of two looks at nothing."""
    other = await connect()
    await broker.maintenance.expire()
    for _ in range(5):
        await come(broker, 10)
        await look(broker, client)
        found = await client.hgetall(KEYS.arrivals)
        await other.maintenance.expire()
        assert await client.hgetall(KEYS.arrivals) == found
    assert (await noted(client)).milli_jobs <= 50_000


async def test_a_clock_that_was_lost_stops_no_look(broker: Broker, client: Any) -> None:
    """The last look lies in its future then: nothing is known until the next sweep."""
    await come(broker, 10)
    await broker.maintenance.expire()
    await client.hset(KEYS.arrivals, "at", int(await client.hget(KEYS.arrivals, "at")) + 3_600_000)
    assert await per_s(broker) is None
    await come(broker, 3)
    await broker.maintenance.expire()
    assert await noted(client) == Arrivals(13, 3_000)
    assert await per_s(broker) == 0.1
    await client.delete(KEYS.clock)
    assert await per_s(broker) is None


async def test_counters_that_go_back_are_no_arrivals(broker: Broker, client: Any) -> None:
    """Evicted, or lost with the latest writes of a server: what is known fades on, and counting begins anew."""
    await come(broker, 50)
    await broker.maintenance.expire()
    await come(broker, 50)
    await look(broker, client)
    before = await noted(client)
    await client.hset(KEYS.counters, f"{LANE}:enqueued", 7)
    passed_ms = await look(broker, client)
    assert await noted(client) == before.looked_at(7, passed_ms)
    assert (await noted(client)).milli_jobs < before.milli_jobs
    await come(broker, 2)
    passed_ms = await look(broker, client)
    assert (await noted(client)).total == 9


@pytest.mark.parametrize("held", ["", "x y", "-3 -4", "1e9 7", "12"])
async def test_what_nobody_of_ours_noted_stops_no_sweep(broker: Broker, client: Any, held: str) -> None:
    """It counts as nothing, and is written over."""
    await come(broker, 4)
    await broker.maintenance.expire()
    await client.hset(KEYS.arrivals, LANE, held)
    await look(broker, client)
    assert (await noted(client)).total == 4


async def test_jobs_of_regions_come_to_their_lane(broker: Broker, client: Any) -> None:
    """Each counts once, wherever it waits."""
    await broker.maintenance.expire()
    await come(broker, 1)
    await broker.maintenance.expire()
    await come(broker, 6, region="eu", remote_after_ms=60_000)
    await look(broker, client)
    assert (await noted(client)).total == 7
    assert await client.hkeys(KEYS.arrivals) != []
    assert not any(b"@" in lane for lane in await client.hkeys(KEYS.arrivals))


async def test_a_pool_is_told_by_the_shard_of_its_jobs(client: Any, connect: Connect) -> None:
    """Another shard that nobody sweeps changes nothing of it."""
    broker = await connect(shards=2)
    job = make_job(shards=2)
    shard = int(job.id.partition("-")[0])
    await broker.jobs.enqueue(job)
    await broker.maintenance.expire(shard)
    assert await per_s(broker) == 0.0
    assert not await client.exists(ShardKeys(1 - shard).arrivals)


async def test_old_run_times_count_little_beside_new_ones(broker: Broker, worker: Puller, client: Any) -> None:
    """An hour later eight jobs are left of those before; the scripts say what the function says."""
    rate = Rate()

    async def serve(run_ms: int, jobs: int) -> Rate:
        after = rate
        for number in range(jobs):
            job = make_job(cost_estimate=10 + number)
            await broker.jobs.enqueue(job)
            at = int((await record_of(client, KEYS.job(job.id)))["at"])
            await broker.attempts.settle(await worker.claim_one(), Outcome.DONE, run_ms=run_ms)
            after = after.observed(run_ms, 10 + number, at)
        return after

    async def told() -> tuple[float | None, float | None]:
        depth = (await broker.stats.depths())[MODEL][Lane.INTERACTIVE]
        return depth.ms_per_job, depth.ms_per_cost

    await broker.jobs.enqueue(make_job())
    assert await worker.claim_one(), "something runs, or there is no depth"
    assert await told() == (None, None)
    rate = await serve(9_000, RATE_JOBS + 3)
    assert await told() == (rate.ms_per_job, rate.ms_per_cost) == (9_000.0, rate.ms_per_cost)
    await pass_time(client, 3_600_000)
    rate = await serve(1_000, 8)
    assert await told() == (rate.ms_per_job, rate.ms_per_cost)
    assert rate.ms_per_job == pytest.approx(5_000)
