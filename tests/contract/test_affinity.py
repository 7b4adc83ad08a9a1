"""Jobs find the worker that holds their prefix: by hand-over within a bound on its load, by claim within a patience."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Any

import pytest

from broker import Broker
from broker.redis.scripts import load_scripts
from queue_schemas import Job, Lane, Pool
from queue_schemas.keys import ShardKeys, queue_key
from scheduling.affinity import LOOKAHEAD, adapter_digest, prefix_digests
from tests.support.queue import MODEL, Backend, Puller, make_job

from .rewriting import CLOCK_OF_TESTS, Rewrite, rewritten, set_clock

KEYS = ShardKeys(0)
START_MS = 1_600_000_000_000
WAITS_AT = queue_key(MODEL, Lane.INTERACTIVE)


def warm_job(conversation: str, turns: int = 1, tenant: str = "acme", model: str = MODEL, **fields: Any) -> Job:
    """A turn of a conversation; each adds a chunk."""
    digests = prefix_digests(tenant, model, {"prompt": "".join(f"{conversation}{n:1024}" for n in range(turns))})
    return make_job(affinity=digests, tenant=tenant, model=model, **fields)


async def offering(broker: Broker, slots: int, **options: Any) -> Puller:
    worker = await Puller(broker).join()
    assert await worker.claim(slots, offer=slots, **options) == []
    return worker


async def holder_first(one: Puller, other: Puller) -> tuple[Puller, Puller]:
    """The one of two workers that was just handed a job, and the other one."""
    handed, _ = bool(await one.handed()), await other.handed()
    return (one, other) if handed else (other, one)


async def outcomes(broker: Broker) -> dict[str, int]:
    """How many jobs were leased warm, cold, and without a prefix."""
    counts: Counter[str] = Counter()
    for (_, _, outcome), number in (await broker.stats.job_counts()).affinity.items():
        counts[outcome] += number
    return dict(counts)


@pytest.fixture
async def timed(backend: Backend) -> Any:
    """A broker and a client whose queue's clock tests set."""
    client: Any = backend.client()
    await client.flushall()
    broker = await backend.connect()
    broker._caller._scripts = rewritten(load_scripts(flags=backend.real), CLOCK_OF_TESTS)
    await set_clock(client, START_MS)
    yield broker, client
    await broker.close()
    await client.aclose()


async def test_a_conversation_returns_to_the_worker_that_holds_it(broker: Broker) -> None:
    """Though another one has more free slots; a new one goes there."""
    one, other = await offering(broker, 4), await offering(broker, 4)
    await broker.jobs.enqueue(warm_job("a", 2))
    first, second = await holder_first(one, other)
    await broker.jobs.enqueue(warm_job("a", 3))
    assert (len(await first.handed()), len(await second.handed())) == (1, 0)
    await broker.jobs.enqueue(warm_job("b", 2))
    assert (len(await first.handed()), len(await second.handed())) == (0, 1)
    assert await outcomes(broker) == {"warm": 1, "cold": 2}


@pytest.mark.parametrize("capacity", [16, 256])
async def test_one_prefix_that_all_share_makes_no_hot_spot(broker: Broker, client: Any, capacity: int) -> None:
    """No worker is loaded beyond the bound: half the free slots of the least loaded one, however many more slots they
    may have."""
    workers = [await offering(broker, 16, capacity=capacity) for _ in range(4)]
    for number in range(40):
        await broker.jobs.enqueue(warm_job("everybody", 3))
        load = [await client.hlen(KEYS.leases(worker.session_id)) for worker in workers]
        assert sum(load) == number + 1
        assert 2 * (16 - max(load) + 2) > 16 - min(load)
    assert min(load) >= 6
    assert (await outcomes(broker))["cold"] == 4


async def test_load_stays_even_where_little_is_warm(broker: Broker) -> None:
    """A system prompt that all share is no reason to wait at one worker with long prompts."""
    workers = [await offering(broker, 8) for _ in range(2)]
    for number in range(8):
        tail = prefix_digests("acme", MODEL, {"prompt": f"{number:2000}" * 8})
        await broker.jobs.enqueue(make_job(affinity=tail + prefix_digests("acme", MODEL, {"prompt": "shared" * 200})))
    load = [len(await worker.handed()) for worker in workers]
    assert sum(load) == 8
    assert min(load) >= 3


async def test_a_claim_takes_a_warm_job_before_the_head_within_its_patience(timed: Any) -> None:
    """Beyond it the head goes first, whatever is warm."""
    broker, client = timed
    worker, other = await Puller(broker).join(), await Puller(broker).join()
    for puller, conversation in ((worker, "mine"), (other, "theirs")):
        await broker.jobs.enqueue(warm_job(conversation, 2))
        await puller.claim_one()
    waiting = [warm_job(name, 3) for name in ("theirs", "new", "mine", "mine", "theirs", "mine")]
    for job in waiting:
        await broker.jobs.enqueue(job)
    await client.hset(KEYS.counters, f"{WAITS_AT}:wait", 100)
    assert (await worker.claim_one()).job == waiting[2], "warm here"
    assert (await other.claim_one()).job == waiting[0], "warm there"
    assert (await other.claim_one()).job == waiting[4], "its own before what is new"
    assert (await other.claim_one()).job == waiting[1], "what is new before what another one holds"
    await set_clock(client, START_MS + 199)
    await client.hset(KEYS.counters, f"{WAITS_AT}:wait", 200)
    await broker.jobs.enqueue(warm_job("theirs", 4))
    assert (await other.claim_one()).job.affinity == warm_job("theirs", 4).affinity
    await broker.jobs.enqueue(warm_job("theirs", 4))
    await client.hset(KEYS.counters, f"{WAITS_AT}:wait", 199)
    assert (await other.claim_one()).job == waiting[3], "its patience is over"
    assert (await other.claim_one()).job == waiting[5]


async def test_nobody_idles_beside_jobs_that_others_hold(broker: Broker) -> None:
    """A claim never leaves a job to another worker."""
    holder, other = await Puller(broker).join(), await Puller(broker).join()
    await broker.jobs.enqueue(warm_job("a"))
    await holder.claim_one()
    for _ in range(3):
        await broker.jobs.enqueue(warm_job("a"))
    assert len(await other.claim(3)) == 3


async def test_retried_jobs_and_other_tenants_keep_their_turns(timed: Any) -> None:
    """A warm job overtakes its own tenant's alone: 12 of two tenants are claimed in turns, retried ones first."""
    broker, client = timed
    worker = await Puller(broker).join()
    await broker.jobs.enqueue(warm_job("a", tenant="one"))
    await broker.attempts.release(await worker.claim_one(), "handed back", counted=False)
    for tenant in ("one", "two"):
        for name in ("x", "a") * 3:
            await broker.jobs.enqueue(warm_job(name, 2, tenant=tenant))
    await client.hset(KEYS.counters, f"{WAITS_AT}:wait", 100)
    claimed = [(await worker.claim_one()).job for _ in range(13)]
    assert len(split := claimed[0].affinity) > 0
    assert split == warm_job("a", tenant="one").affinity, "the retried job goes first"
    turns = [job.tenant for job in claimed[1:]]
    assert all(abs(turns[:n].count("one") - turns[:n].count("two")) <= 1 for n in range(13))


async def test_a_claim_compares_a_bounded_number_of_jobs(timed: Any) -> None:
    """What is behind them waits for its turn."""
    broker, client = timed
    worker, other = await Puller(broker).join(), await Puller(broker).join()
    for puller, conversation in ((worker, "mine"), (other, "theirs")):
        await broker.jobs.enqueue(warm_job(conversation))
        await puller.claim_one()
    await asyncio.gather(*(broker.jobs.enqueue(warm_job("theirs")) for _ in range(LOOKAHEAD)))
    await broker.jobs.enqueue(warm_job("mine"))
    await client.hset(KEYS.counters, f"{WAITS_AT}:wait", 100)
    assert (await other.claim_one()).job.affinity == warm_job("theirs").affinity
    assert (await worker.claim_one()).job.affinity == warm_job("mine").affinity
    await broker.jobs.enqueue(warm_job("theirs"))
    await broker.jobs.enqueue(warm_job("mine"))
    assert (await worker.claim_one()).job.affinity == warm_job("theirs").affinity


async def test_a_favourite_worker_that_dies_is_forgotten(broker: Broker) -> None:
    """Its jobs run elsewhere at once, and their conversations follow them there."""
    dead = await offering(broker, 4)
    for _ in range(2):
        await broker.jobs.enqueue(warm_job("a", 2))
    assert len(await dead.handed()) == 2
    assert (await broker.maintenance.reclaim(dead.session_id)).requeued == 2
    heir, idle = await Puller(broker).join(), await Puller(broker).join()
    assert len(await heir.claim(6, offer=6)) == 2
    assert await idle.claim(5, offer=5) == []
    await broker.jobs.enqueue(warm_job("a", 3))
    assert (len(await heir.handed()), len(await idle.handed())) == (1, 0)


@pytest.mark.parametrize(("number", "handed"), [(1, (1, 0)), (2, (0, 1))])
async def test_a_cache_that_forgot_is_cold(broker: Broker, number: int, handed: tuple[int, int]) -> None:
    """The worker says so with its next claim: what it was leased under its number before last counts no more."""
    warm, free = await offering(broker, 4), await offering(broker, 4)
    await broker.jobs.enqueue(warm_job("a", 2))
    warm, free = await holder_first(warm, free)
    pools = [(MODEL, tuple(Lane))]
    warm.seq += 1
    await broker.workers.claim(0, warm.session_id, warm.seq, 0, 3, pools, offer=3, received=1, cache=number)
    await broker.jobs.enqueue(warm_job("a", 3))
    assert (len(await warm.handed()), len(await free.handed())) == handed


async def test_a_large_job_wakes_the_worker_that_holds_its_prefix(broker: Broker) -> None:
    """It is too large to be handed over: whoever is woken claims it."""
    one, other = await offering(broker, 4), await offering(broker, 4)
    await broker.jobs.enqueue(warm_job("a", 2))
    holder, idle = await holder_first(one, other)
    for _ in range(2):
        await broker.jobs.enqueue(warm_job("a", 2, body=b"x" * 300_000))
        assert await idle.control_messages() == []
        assert [message.kind.value for message in await holder.control_messages()] == ["wake"]
        assert len(await holder.claim(3, offer=3)) == 1


async def test_clients_cannot_grow_the_table(backend: Backend) -> None:
    """Distinct prefixes replace each other in a fixed number of slots; here with one character for the slot, 64."""
    client: Any = backend.client()
    await client.flushall()
    broker = await backend.connect()
    small = Rewrite("affinity_rules", "local SLOT_CHARS = 3", "local SLOT_CHARS = 1")
    broker._caller._scripts = rewritten(load_scripts(flags=backend.real), small)
    try:
        worker = await Puller(broker).join()
        for start in range(0, 512, 32):
            await asyncio.gather(*(broker.jobs.enqueue(warm_job(f"hostile {start + n}", 4)) for n in range(32)))
            assert len(await worker.claim(32)) == 32
        assert 48 <= await client.hlen(KEYS.warm) <= 64
        longest = max(len(held) for held in (await client.hgetall(KEYS.warm)).values())
        assert longest <= 11 + 1 + len(worker.session_id) + 2
    finally:
        await broker.close()
        await client.aclose()


async def test_other_tenants_never_match(broker: Broker, client: Any) -> None:
    """The same text of another tenant, and of another model, is cold."""
    one, other = await offering(broker, 4), await offering(broker, 4)
    for tenant in ("one", "two"):
        await broker.jobs.enqueue(warm_job("a", 3, tenant=tenant))
    assert (len(await one.handed()), len(await other.handed())) == (1, 1)
    assert await outcomes(broker) == {"cold": 2}
    assert await client.hlen(KEYS.warm) == 6


async def test_a_thousand_adapters_return_to_the_workers_that_loaded_them(broker: Broker, client: Any) -> None:
    """Each is a pool of its own; short prompts have affinity by their adapter alone. What is kept stays small."""
    adapters = [Pool(f"adapter-{number}") for number in range(1_000)]
    workers = [await Puller(broker).join() for _ in range(2)]
    for worker in workers:
        assert await worker.claim(1_000, models=adapters, lanes=[Lane.INTERACTIVE], offer=1_000) == []

    async def served_by() -> dict[str, int]:
        for adapter in adapters:
            await broker.jobs.enqueue(make_job(model=adapter, affinity=adapter_digest(adapter)))
        handed = [await _all_handed(worker) for worker in workers]
        return {job.model: index for index, jobs in enumerate(handed) for job in jobs}

    async def free_all() -> None:
        for worker in workers:
            assert await worker.claim(1_000, models=adapters, lanes=[Lane.INTERACTIVE], offer=1_000) == []

    first = await served_by()
    await free_all()
    second = await served_by()
    assert len(first) == 1_000
    assert first == second
    assert await client.hlen(KEYS.warm) <= 1_000


async def _all_handed(worker: Puller) -> list[Job]:
    jobs: list[Job] = []
    while leases := await worker.handed():
        jobs += [lease.job for lease in leases]
    return jobs


async def test_short_prompts_cost_nothing(broker: Broker, client: Any, worker: Puller) -> None:
    """Nothing is kept of them."""
    for _ in range(3):
        await broker.jobs.enqueue(make_job())
    assert len(await worker.claim(3)) == 3
    assert not await client.exists(KEYS.warm)
    assert f"{WAITS_AT}:wait".encode() not in await client.hkeys(KEYS.counters)
    assert await outcomes(broker) == {"none": 3}


def test_digests_of_conversations_are_distinct() -> None:
    """The jobs of these tests are what their names say."""
    names = [warm_job(name, turns).affinity for name, turns in itertools.product("ab", (1, 2))]
    assert len(set(names)) == 4
    assert names[1].endswith(names[0])
