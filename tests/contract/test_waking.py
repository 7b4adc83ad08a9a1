"""Parking and waking: an idle fleet costs nothing, a new job wakes one worker, work never waits beside a sleeper."""

from __future__ import annotations

import asyncio
from typing import Any

from broker import Broker, Expired
from queue_schemas import Control, ControlKind, Lane
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, make_job

WAKE = Control(ControlKind.WAKE)


async def parked(broker: Broker, count: int, **options: Any) -> list[Puller]:
    """Workers that found nothing."""
    workers = [await Puller(broker).join() for _ in range(count)]
    for worker in workers:
        assert await worker.claim(**options) == []
    return workers


async def woken(workers: list[Puller]) -> list[Puller]:
    """Those that were told to claim since the last look."""
    return [worker for worker in workers if WAKE in await worker.control_messages()]


async def test_a_job_wakes_exactly_one_parked_worker(broker: Broker) -> None:
    """Three idle workers, one job: one is woken."""
    workers = await parked(broker, 3)
    await broker.jobs.enqueue(make_job())
    assert len(await woken(workers)) == 1


async def test_each_job_wakes_another_worker(broker: Broker) -> None:
    """Two jobs wake two workers, the third wakes the last, the fourth finds all awake."""
    workers = await parked(broker, 3)
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(2)))
    first = await woken(workers)
    assert len(first) == 2
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(2)))
    assert await woken(workers) == [worker for worker in workers if worker not in first]


async def test_a_busy_worker_is_not_woken(broker: Broker, worker: Puller) -> None:
    """Who got all it asked for is not parked."""
    await broker.jobs.enqueue(make_job())
    await worker.claim_one()
    await broker.jobs.enqueue(make_job())
    assert await worker.control_messages() == []


async def test_a_worker_that_found_less_than_it_wanted_is_woken(broker: Broker, worker: Puller) -> None:
    """With a slot left free a worker is parked while it runs."""
    await broker.jobs.enqueue(make_job())
    assert len(await worker.claim(2)) == 1
    await broker.jobs.enqueue(make_job())
    assert await worker.control_messages() == [WAKE]


async def test_who_leaves_work_behind_wakes_the_next(broker: Broker) -> None:
    """Jobs of two models both wake the worker that parked first; it has one slot, and its claim wakes the other one."""
    first, second = await Puller(broker).join(), await Puller(broker).join()
    for worker in (first, second):
        assert await worker.claim(models=("x", "y")) == []
        await asyncio.sleep(0.005)  # so that they parked at different times, whatever the clock's grain
    await broker.jobs.enqueue(make_job(model="x"))
    await broker.jobs.enqueue(make_job(model="y"))
    assert await woken([first, second]) == [first]
    assert len(await first.claim(1, models=("x", "y"))) == 1
    assert await woken([second]) == [second]
    assert len(await second.claim(1, models=("x", "y"))) == 1


async def test_a_chain_of_wakes_empties_the_queue(broker: Broker) -> None:
    """Workers that claim only when woken, one job at a time, take all jobs, though each job woke only one of them."""
    workers = await parked(broker, 3)
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(12)))
    taken = 0
    async with asyncio.timeout(10):
        while taken < 12:
            for worker in await woken(workers):
                while leases := await worker.claim(1):
                    taken += len(leases)
    assert taken == 12


async def test_a_worker_is_woken_only_for_what_it_serves(broker: Broker) -> None:
    """Jobs of another model or another lane leave a parked worker asleep."""
    (worker,) = await parked(broker, 1, models=("a",), lanes=[Lane.INTERACTIVE])
    await broker.jobs.enqueue(make_job(model="b"))
    await broker.jobs.enqueue(make_job(model="a", lane=Lane.BATCH))
    assert await worker.control_messages() == []


async def test_a_parked_worker_that_is_gone_is_passed_over(broker: Broker) -> None:
    """The wake goes to one that is alive."""
    workers = await parked(broker, 3)
    await broker.maintenance.reclaim(workers[0].session_id)
    await broker.workers.leave(workers[1].session_id)
    await broker.jobs.enqueue(make_job())
    assert await woken(workers[2:]) == workers[2:]


async def test_the_sweep_wakes_where_work_and_sleepers_coexist(broker: Broker) -> None:
    """A wake that was lost with its worker is made up for within a second, by the sweep."""
    workers = await parked(broker, 2)
    await broker.jobs.enqueue(make_job())
    (dead,) = await woken(workers)
    await broker.maintenance.reclaim(dead.session_id)
    alive = [worker for worker in workers if worker is not dead]
    assert await woken(alive) == []
    assert (await broker.maintenance.expire()).woken == 1
    assert await woken(alive) == alive


async def test_lost_work_wakes_a_worker(broker: Broker, worker: Puller) -> None:
    """What a dead worker held wakes an idle one, and what a living one hands back does too."""
    await broker.jobs.enqueue(make_job())
    await worker.claim_one()
    idle = await parked(broker, 1)
    await broker.maintenance.reclaim(worker.session_id)
    assert await woken(idle) == idle
    await broker.attempts.release(await idle[0].claim_one(), "draining", counted=False)
    other = await parked(broker, 1, models=("another",))
    assert await woken(other) == []


async def test_the_dead_are_not_woken_for_what_they_held(broker: Broker) -> None:
    """A worker with a free slot is parked too: when it dies or leaves, its jobs wake another one at once."""
    for how in (broker.maintenance.reclaim, broker.workers.leave):
        gone = await Puller(broker).join()
        await broker.jobs.enqueue(make_job())
        assert len(await gone.claim(2)) == 1
        idle = await parked(broker, 1)
        await how(gone.session_id)
        assert await woken(idle) == idle
        assert len(await idle[0].claim(1)) == 1


async def test_the_sweep_wakes_nobody_for_what_it_ended(broker: Broker) -> None:
    """A job that expires just now is no work."""
    workers = await parked(broker, 2)
    await broker.jobs.enqueue(make_job(ttl_ms=5))
    await asyncio.sleep(0.01)
    assert len(await woken(workers)) == 1
    assert await broker.maintenance.expire() == Expired(expired=1, woken=0)
    assert await woken(workers) == []


async def test_the_wake_of_a_blocked_reader_arrives_at_once(broker: Broker) -> None:
    """A worker that blocks on its control stream hears of a new job without polling."""
    (worker,) = await parked(broker, 1)
    waiting = asyncio.create_task(worker.control_messages(block_ms=8_000))
    await asyncio.sleep(0)
    async with asyncio.timeout(4):
        await broker.jobs.enqueue(make_job())
        assert await waiting == [WAKE]


async def test_control_messages_are_read_once_by_position(broker: Broker, worker: Puller) -> None:
    """Reading on from the last id skips nothing and repeats nothing; reading again from an old id repeats."""
    await broker.fleet.send_control(worker.session_id, Control(ControlKind.PING))
    await broker.fleet.send_control(worker.session_id, Control(ControlKind.DRAIN))
    first = await broker.workers.read_control(0, worker.session_id, "0", 1)
    assert [message for _, message in first if message][-2:] == [Control(ControlKind.PING), Control(ControlKind.DRAIN)]
    assert await broker.workers.read_control(0, worker.session_id, first[-1][0], 1) == []
    assert await broker.workers.read_control(0, worker.session_id, first[-2][0], 1) == first[-1:]


async def test_renewing_trims_what_was_read(broker: Broker, worker: Puller, client: Any) -> None:
    """A control stream does not grow over a worker's life."""
    for _ in range(50):
        await broker.fleet.send_control(worker.session_id, Control(ControlKind.PING))
    await worker.control_messages()
    await worker.control_messages()
    await broker.workers.renew(worker.session_id)
    assert await client.xlen(ShardKeys(0).control(worker.session_id)) <= 1
    assert 0 < await client.pttl(ShardKeys(0).control(worker.session_id)) <= 25 * 3_600_000


async def test_nothing_is_sent_to_a_worker_that_is_gone(broker: Broker, worker: Puller, client: Any) -> None:
    """A control message does not bring a left worker's stream back to life."""
    await broker.workers.leave(worker.session_id)
    assert await broker.fleet.send_control(worker.session_id, Control(ControlKind.PING)) is False
    assert not await client.exists(ShardKeys(0).control(worker.session_id))


async def test_a_worker_that_left_is_parked_nowhere(broker: Broker, client: Any) -> None:
    """Neither a leave nor a reclaim leaves a mark among the parked."""
    workers = await parked(broker, 2)
    await broker.workers.leave(workers[0].session_id)
    await broker.maintenance.reclaim(workers[1].session_id)
    assert await client.zcard(ShardKeys(0).parked(MODEL, Lane.INTERACTIVE)) == 0


async def test_a_worker_whose_pools_changed_is_parked_only_where_it_pulls(
    broker: Broker, worker: Puller, client: Any
) -> None:
    """After a new assignment the old model's jobs no longer wake it."""
    assert await worker.claim(models=("old",)) == []
    assert await worker.claim(models=("new",)) == []
    await broker.jobs.enqueue(make_job(model="old"))
    assert await worker.control_messages() == []
    await broker.jobs.enqueue(make_job(model="new"))
    assert await worker.control_messages() == [WAKE]


async def test_a_repeated_claim_that_brings_less_is_followed_by_a_wake(broker: Broker, worker: Puller) -> None:
    """Its worker takes itself for parked, which it is not: the first reply, which was lost, gave all it asked for."""
    first, second = make_job(), make_job()
    await broker.jobs.enqueue(first)
    await broker.jobs.enqueue(second)
    assert len(await worker.claim(2)) == 2
    worker.seq -= 1
    assert len(await worker.claim(2)) == 2
    assert await worker.control_messages() == []
    await broker.jobs.cancel(first.id, "its client went away")
    worker.seq -= 1
    assert [lease.job.id for lease in await worker.claim(2)] == [second.id]
    assert WAKE in await worker.control_messages()
