"""Jobs that are handed to parked workers by the call that enqueues them: leased at once, without a wake and a claim."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker
from queue_schemas import LANES, Control, ControlKind, Lane, MarkerKind, Outcome, Pool, Settled, State
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, answer_frame, live_counts, make_job

from .conftest import Connect, Listener

KEYS = ShardKeys(0)
WAKE = Control(ControlKind.WAKE)


async def offering(broker: Broker, slots: int, **options: Any) -> Puller:
    """A worker that found nothing and offers all its slots."""
    worker = await Puller(broker, **options).join()
    assert await worker.claim(slots, offer=slots) == []
    return worker


async def depth(broker: Broker) -> tuple[int, int]:
    """Waiting and leased jobs of the model's interactive lane."""
    found = (await broker.stats.depths()).get(MODEL, {}).get(Lane.INTERACTIVE)
    return (found.waiting, found.leased) if found else (0, 0)


async def test_a_job_is_leased_by_the_call_that_enqueues_it(broker: Broker, client: Any, listener: Listener) -> None:
    """Its worker reads the whole lease, and settles it like any other; nothing is left of it."""
    worker = await offering(broker, 2)
    job = make_job(reply_to=listener.router, ttl_ms=60_000)
    assert await broker.jobs.enqueue(job) is State.QUEUED
    assert await depth(broker) == (0, 1)
    (lease,) = await worker.handed()
    assert (lease.job, lease.epoch, lease.attempt, lease.remaining_ms, lease.suspect) == (job, 1, 1, 60_000, False)
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    assert [frame.data for frame in await listener.received() if hasattr(frame, "data")] == [b"answer"]
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.DUPLICATE
    assert live_counts(await client.hgetall(KEYS.counters)) == {}
    assert await client.hlen(KEYS.budget) == 0
    assert await client.zcard(KEYS.deadlines) == 0


async def test_the_offer_bounds_what_is_handed_over(broker: Broker) -> None:
    """What is more waits, and the worker, which is parked no more, finds it with its next claim."""
    worker = await offering(broker, 2)
    jobs = [make_job() for _ in range(3)]
    await asyncio.gather(*map(broker.jobs.enqueue, jobs))
    assert [lease.job for lease in await worker.handed()] == jobs[:2]
    assert await depth(broker) == (1, 2)
    assert [lease.job for lease in await worker.claim(1, offer=1)] == jobs[2:]


async def test_the_worker_with_the_lowest_load_is_handed_the_next_job(broker: Broker) -> None:
    """So that load spreads; of idle ones, the one with the most free slots."""
    small, large = await offering(broker, 1), await offering(broker, 3)
    for handed in ((0, 1), (1, 0), (0, 1), (0, 1)):
        await broker.jobs.enqueue(make_job())
        assert (len(await small.handed()), len(await large.handed())) == handed


async def test_workers_with_unlike_slots_are_loaded_alike(broker: Broker) -> None:
    """By what part is busy of that which each could run: one that has grown to 8 slots is not preferred to one that has
    2 and may grow as far, nor is one that could run 3 loaded like them."""
    grown, new, small = [await Puller(broker).join() for _ in range(3)]
    for worker, slots, capacity in ((grown, 8, 8), (new, 2, 8), (small, 3, 3)):
        assert await worker.claim(slots, offer=slots, slots=slots, capacity=capacity) == []
    for _ in range(5):
        await broker.jobs.enqueue(make_job())
    assert sorted([len(await worker.handed()) for worker in (grown, new)]) == [2, 2]
    assert len(await small.handed()) == 1
    for _ in range(4):
        await broker.jobs.enqueue(make_job())
    assert (len(await grown.handed()), len(await new.handed()), len(await small.handed())) == (3, 0, 1)


async def test_nothing_is_handed_over_past_a_job_that_waits(broker: Broker) -> None:
    """First come, first served: one waits that this worker may not have again so soon."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job())
    (lease,) = await worker.handed()
    await broker.attempts.release(lease, "the engine was busy", counted=True)
    assert await depth(broker) == (1, 0)
    await broker.jobs.enqueue(make_job())
    assert await depth(broker) == (2, 0)
    assert [message for message in await worker.control_messages() if message.lease is not None] == []


async def test_a_large_job_waits_to_be_claimed(broker: Broker) -> None:
    """Control streams carry small envelopes only."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job(body=b"x" * 300_000))
    assert await worker.control_messages() == [WAKE]
    assert len(await worker.claim(2, offer=2)) == 1


async def test_lanes_and_pools_that_a_worker_does_not_serve_wait(broker: Broker) -> None:
    """An offer counts where the claim was parked."""
    worker = await Puller(broker).join()
    assert await worker.claim(2, lanes=[Lane.BATCH], offer=2) == []
    await broker.jobs.enqueue(make_job())
    await broker.jobs.enqueue(make_job(model="other"))
    assert await worker.handed() == []
    await broker.jobs.enqueue(make_job(lane=Lane.BATCH))
    assert len(await worker.handed()) == 1


async def test_a_region_hands_over_to_its_own_workers(broker: Broker) -> None:
    """Others may run the job later, but are not handed it."""
    here, there = await offering(broker, 1, region="here"), await offering(broker, 1, region="there")
    await broker.jobs.enqueue(make_job(region="there", remote_after_ms=1_000))
    assert await here.handed() == []
    (lease,) = await there.handed()
    assert await broker.attempts.release(lease, "handed back", counted=False) is Settled.OK
    assert await depth(broker) == (1, 0), "an attempt begun has left its region"


async def test_jobs_on_their_way_count_among_what_a_claim_asks_for(broker: Broker) -> None:
    """A claim that crossed with a job that was handed over does not bring more than there are slots."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job())
    for _ in range(2):
        await broker.jobs.enqueue(make_job(lane=Lane.BATCH, body=b"x" * 300_000))
    assert len(await worker.claim(2, offer=2)) == 1
    assert len(await worker.handed()) == 1


async def test_a_repeated_enqueue_hands_over_once(broker: Broker) -> None:
    """Its reply was lost: the job is known."""
    worker = await offering(broker, 2)
    job = make_job()
    assert await broker.jobs.enqueue(job) is State.QUEUED
    assert await broker.jobs.enqueue(job) is State.LEASED
    assert len(await worker.handed()) == 1
    assert await depth(broker) == (0, 1)


async def test_a_repeated_claim_repeats_the_offer(broker: Broker) -> None:
    """The answer to a claim was lost, and a job was handed over meanwhile."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job())
    pools = [(MODEL, tuple(Lane))]
    again = await broker.workers.claim(0, worker.session_id, worker.seq, 0, 2, pools, offer=2, received=0)
    assert (again.leases, again.parked, again.handed_over, again.offered) == ((), True, 1, 1)
    await broker.jobs.enqueue(make_job())
    again = await broker.workers.claim(0, worker.session_id, worker.seq, 0, 2, pools, offer=2, received=0)
    assert (again.parked, again.handed_over, again.offered) == (False, 2, 0)
    assert len(await worker.handed()) == 2


async def test_the_dead_are_handed_nothing(broker: Broker) -> None:
    """A worker that was declared dead offers nothing any more; what it was handed and never read of runs elsewhere."""
    dead = await offering(broker, 2)
    job = make_job()
    await broker.jobs.enqueue(job)
    assert (await broker.maintenance.reclaim(dead.session_id)).requeued == 1
    other = await Puller(broker).join()
    (again,) = await other.claim(1)
    assert (again.job, again.epoch, again.attempt) == (job, 2, 2)
    await broker.jobs.enqueue(make_job())
    assert await depth(broker) == (1, 1)


async def test_a_worker_without_a_control_stream_is_handed_nothing(broker: Broker, client: Any) -> None:
    """It would not hear of it: the job goes to the next one, or waits."""
    deaf = await offering(broker, 3)
    await client.delete(KEYS.control(deaf.session_id))
    await broker.jobs.enqueue(make_job())
    assert await depth(broker) == (1, 0)
    other = await Puller(broker).join()
    assert len(await other.claim(3, offer=3)) == 1
    await client.delete(KEYS.control(deaf.session_id))
    await broker.jobs.enqueue(make_job())
    assert len(await other.handed()) == 1


async def test_who_leaves_gives_back_what_it_has_not_read(broker: Broker) -> None:
    """Uncounted."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job())
    assert (await broker.workers.leave(worker.session_id)).requeued == 1
    (again,) = await (await Puller(broker).join()).claim(1)
    assert again.attempt == 1


async def test_a_claim_withdraws_the_offer(broker: Broker) -> None:
    """A worker that drains claims nothing, and is handed nothing from then on."""
    worker = await offering(broker, 2)
    assert await worker.claim(0) == []
    await broker.jobs.enqueue(make_job())
    assert await worker.control_messages() == []
    assert await depth(broker) == (1, 0)


async def test_a_job_that_is_on_its_way_is_left_to_its_worker(broker: Broker) -> None:
    """A worker that reconciles its leases has not read of it; once it has, and does not run it, the job waits again."""
    worker = await offering(broker, 2)
    await broker.jobs.enqueue(make_job())
    assert await broker.workers.reconcile_leases(0, worker.session_id, worker.seq, ()) == set()
    assert await depth(broker) == (0, 1)
    (lease,) = await worker.handed()
    assert await worker.control_messages() == []
    assert await broker.workers.reconcile_leases(0, worker.session_id, worker.seq, (lease,)) == set()
    assert await depth(broker) == (0, 1)
    assert await broker.workers.reconcile_leases(0, worker.session_id, worker.seq, ()) == set()
    assert await depth(broker) == (1, 0)


async def test_a_cancelled_job_is_aborted_at_the_worker_that_it_was_handed_to(
    broker: Broker, listener: Listener
) -> None:
    """Whether it has read of it or not: the abort stands behind the job."""
    worker = await offering(broker, 1)
    job = make_job(reply_to=listener.router)
    await broker.jobs.enqueue(job)
    assert await broker.jobs.cancel(job.id, "its client went away") is State.LEASED
    kinds = [message.kind for message in await worker.control_messages()]
    assert kinds == [ControlKind.JOB, ControlKind.ABORT]
    await listener.expect_marker(MarkerKind.CANCELLED)


@pytest.mark.parametrize("job_id", [None, b"\xff no id"])
async def test_what_a_worker_cannot_read_is_a_spent_attempt(broker: Broker, client: Any, job_id: bytes | None) -> None:
    """As with a claim, others may be able to read it, else it becomes a dead letter; garbage concerns no job. The slot
    is offered again."""
    worker = await offering(broker, 1)
    job = make_job(max_attempts=1)
    await broker.jobs.enqueue(job)
    key = KEYS.control(worker.session_id)
    (entry_id, fields) = (await client.xrange(key))[-1]
    await client.xdel(key, entry_id)
    await client.xadd(key, fields | {b"env": b"\xc1 no envelope", b"id": job_id or fields[b"id"]})
    assert await worker.handed() == []
    dead = [letter.job_id for letter in (await broker.dead_letters.page("", 10)).letters]
    assert dead == ([job.id] if job_id is None else [])
    assert await worker.claim(1, offer=1) == []
    await broker.jobs.enqueue(make_job())
    assert len(await worker.handed()) == 1


@pytest.mark.parametrize("jobs", [40])
async def test_control_streams_do_not_grow(broker: Broker, client: Any, jobs: int) -> None:
    """What was read is dropped long before the next renewal: envelopes must not pile up."""
    worker = await offering(broker, jobs)
    for _ in range(jobs):
        await broker.jobs.enqueue(make_job(body=b"x" * 60_000))
        await worker.handed()
    assert await client.xlen(KEYS.control(worker.session_id)) < 25


async def test_another_process_hands_over_too(connect: Connect) -> None:
    """Offers stand in Redis."""
    worker = await offering(await connect(), 1)
    await (await connect()).jobs.enqueue(make_job())
    assert len(await worker.handed()) == 1


MANY = [f"model-{number}" for number in range(20)]
"""With three lanes each, more queues than a worker is parked at anew with each claim."""


async def of_many_models(broker: Broker, offer: int, **options: Any) -> Puller:
    """A worker of many models that found nothing and offers slots, twice: with the second claim its entries among the
    parked stand already."""
    worker = await Puller(broker).join()
    for _ in range(2):
        assert await worker.claim(offer, MANY, offer=offer, **options) == []
    return worker


async def parked_at(client: Any, model: str) -> set[str]:
    """The workers that count as parked for a model, or as offering slots there."""
    found = [await client.zrange(keys(Pool(model), Lane.INTERACTIVE), 0, -1) for keys in (KEYS.parked, KEYS.offers)]
    return {worker.decode() for workers in found for worker in workers}


async def test_a_worker_of_many_models_offers_anew_at_all_of_them(broker: Broker) -> None:
    """Whatever model used up its offer, and as often as it likes."""
    worker = await of_many_models(broker, 2)
    for round_ in range(3):
        for model in MANY[round_ : round_ + 2]:
            await broker.jobs.enqueue(make_job(model=model))
        assert len(await worker.handed()) == 2
        await broker.jobs.enqueue(make_job(model=MANY[-1]))
        assert await worker.handed() == [], "nothing is offered any more"
        assert len(await worker.claim(1, MANY)) == 1
        assert await worker.claim(2, MANY, offer=2) == []
    await broker.jobs.enqueue(make_job(model=MANY[0], body=b"x" * 300_000))
    assert await worker.control_messages() == [WAKE], "it is idle again"


async def test_a_worker_of_many_models_whose_offer_is_used_up_is_not_woken(broker: Broker) -> None:
    """Another one is, though that parked first."""
    full, idle = await of_many_models(broker, 1), await Puller(broker).join()
    assert await idle.claim(1, MANY) == []
    await broker.jobs.enqueue(make_job(model=MANY[0]))
    assert len(await full.handed()) == 1
    for model in MANY[:2]:
        await broker.jobs.enqueue(make_job(model=model))
        assert await full.control_messages() == []
        assert await idle.control_messages() == [WAKE]
        assert len(await idle.claim(1, MANY)) == 1
        assert await idle.claim(1, MANY) == []


async def test_a_used_up_offer_of_many_models_is_not_answered_as_parked(broker: Broker) -> None:
    """A repeated claim says so: its worker has to claim again."""
    worker = await of_many_models(broker, 1)
    await broker.jobs.enqueue(make_job(model=MANY[0]))
    again = await broker.workers.claim(
        0, worker.session_id, worker.seq, 0, 1, [(Pool(model), LANES) for model in MANY], offer=1, received=0
    )
    assert (again.parked, again.handed_over, again.offered) == (False, 1, 0)


async def test_a_woken_worker_of_many_models_is_parked_everywhere_again(broker: Broker, client: Any) -> None:
    """Also where the wake took it out."""
    worker = await of_many_models(broker, 1)
    await broker.jobs.enqueue(make_job(model=MANY[0], body=b"x" * 300_000))
    assert await worker.control_messages() == [WAKE]
    assert len(await worker.claim(2, MANY, offer=2)) == 1
    for model in MANY:
        assert await parked_at(client, model) == {worker.session_id}
    await broker.jobs.enqueue(make_job(model=MANY[0], body=b"x" * 300_000))
    assert await worker.control_messages() == [WAKE]


async def test_a_dead_worker_of_many_models_is_parked_nowhere(broker: Broker, client: Any) -> None:
    """Whether its offer was used up or not."""
    worker = await of_many_models(broker, 1)
    await broker.jobs.enqueue(make_job(model=MANY[0]))
    await broker.maintenance.reclaim(worker.session_id)
    for model in MANY:
        assert await parked_at(client, model) == set()


async def test_full_workers_of_many_models_do_not_hide_a_free_one_for_long(broker: Broker) -> None:
    """Only some of those that offer slots are looked at, those with the lowest load first: of these, the ones that are
    found full step back. Here they might have more slots, and the free one has not."""
    full = [await of_many_models(broker, 2, capacity=16) for _ in range(20)]
    for _ in range(40):
        await broker.jobs.enqueue(make_job(model=MANY[0]))
    assert [len(await worker.handed()) for worker in full] == [2] * 20
    free = await of_many_models(broker, 1, slots=4)
    await broker.jobs.enqueue(make_job(model=MANY[1]))
    assert await free.control_messages() == [WAKE]
    assert len(await free.claim(2, MANY, offer=2, slots=4)) == 1
    await broker.jobs.enqueue(make_job(model=MANY[1]))
    assert len(await free.handed()) == 1


async def test_who_offers_nothing_more_is_not_put_back_among_those_who_do(broker: Broker, client: Any) -> None:
    """One that was unparked in the same call stays so."""
    workers = [await offering(broker, 1) for _ in range(17)]
    await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(20)))
    handed = [worker.session_id for worker in workers if await worker.handed()]
    assert len(handed) >= 16
    offers = await client.zrange(KEYS.offers(MODEL, Lane.INTERACTIVE), 0, -1)
    assert {worker.decode() for worker in offers} == {worker.session_id for worker in workers} - set(handed)


async def test_loads_are_told_apart_however_many_slots_workers_may_have(broker: Broker) -> None:
    """Also where more of them offer slots than one call looks at."""
    workers = [await of_many_models(broker, 64, capacity=65_536) for _ in range(24)]
    for _ in range(48):
        await broker.jobs.enqueue(make_job(model=MANY[0]))
    assert {len(await worker.handed()) for worker in workers} == {2}
