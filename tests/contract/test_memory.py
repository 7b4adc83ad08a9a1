"""Nothing is left over: keys, budgets and memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from broker import Broker, BrokerSettings
from queue_schemas import (
    BANDS,
    LANES,
    BrokerFull,
    Job,
    Lane,
    Outcome,
    Settled,
    State,
    new_job_id,
)
from queue_schemas.keys import META, ShardKeys
from tests.support.queue import MODEL, Puller, ServerBackend, answer_frame, live_counts, make_job
from tests.support.servers import Server

from .conftest import Listener

KEYS = ShardKeys(0)


async def settled_keys(client: Any) -> tuple[set[str], set[str]]:
    """(keys that stay, keys that expire) now."""
    stay: set[str] = set()
    expire: set[str] = set()
    async for key in client.scan_iter(count=1_000):
        (expire if await client.pttl(key) > 0 else stay).add(key.decode())
    return stay, expire


async def test_every_key_is_one_of_the_contract(
    broker: Broker, worker: Puller, listener: Listener, client: Any
) -> None:
    """The names that the scripts build are those of ``queue_schemas.keys``, for names that need encoding too."""
    tenant = "a:b{c} ü%"
    jobs = [make_job(tenant=tenant, reply_to=listener.router, max_attempts=1) for _ in range(5)]
    for job in jobs:
        await broker.jobs.enqueue(job)
    leases = await worker.claim(3)
    await broker.attempts.release(leases[0], "draining", counted=False)
    await broker.attempts.release(leases[1], "broken", counted=True)
    idle = await Puller(broker).join()
    assert await idle.claim(lanes=[Lane.BATCH]) == []
    rival = make_job(tenant="rival")
    await broker.jobs.enqueue(rival)
    for _ in range(3):
        await worker.claim(1)
    band = jobs[0].band
    allowed = {
        META,
        KEYS.queue(MODEL, Lane.INTERACTIVE, band, tenant),
        KEYS.queue(MODEL, Lane.INTERACTIVE, band, "rival"),
        KEYS.retry(MODEL, Lane.INTERACTIVE),
        KEYS.active(MODEL, Lane.INTERACTIVE, band),
        KEYS.service(MODEL, Lane.INTERACTIVE, band),
        *(KEYS.job(job.id) for job in (*jobs, rival)),
        *(KEYS.leases(puller.session_id) for puller in (worker, idle)),
        *(KEYS.claimed(puller.session_id) for puller in (worker, idle)),
        *(KEYS.control(puller.session_id) for puller in (worker, idle)),
        *(KEYS.parked(MODEL, lane) for lane in LANES),
        KEYS.reply(listener.router),
        *(KEYS.clock, KEYS.renewals, KEYS.deadlines, KEYS.dead, KEYS.budget, KEYS.counters),
    }
    allowed |= {KEYS.dead_request(entry.decode()) for entry, _ in await client.xrange(KEYS.dead)}
    stay, expire = await settled_keys(client)
    assert stay | expire <= allowed
    assert {KEYS.queue(MODEL, Lane.INTERACTIVE, band, tenant), KEYS.service(MODEL, Lane.INTERACTIVE, band)} <= (
        stay | expire
    )


async def test_a_drained_queue_leaves_only_counters(broker: Broker, listener: Listener, client: Any) -> None:
    """After everything has ended and everybody has left: no stream, record, lease or parking mark that stays."""
    before, _ = await settled_keys(client)
    pullers = [await Puller(broker).join() for _ in range(3)]
    for puller in pullers:
        await puller.claim(2)
    jobs = [
        make_job(tenant=f"t{turn % 5}", lane=LANES[turn % 3], band=turn % BANDS, reply_to=listener.router)
        for turn in range(60)
    ]
    await asyncio.gather(*map(broker.jobs.enqueue, jobs))
    await broker.jobs.cancel(jobs[0].id, "gone")
    await broker.jobs.cancel(new_job_id(0), "unknown")
    ended, handed_back = 1, set()
    while ended < 60:
        for puller in pullers:
            for turn, lease in enumerate(await puller.claim(4)):
                if turn == 0 and lease.job.id not in handed_back:
                    handed_back.add(lease.job.id)
                    await broker.attempts.release(lease, "draining", counted=False)
                else:
                    await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
                    ended += 1
    for puller in pullers:
        assert await puller.claim(2) == []
        await broker.workers.leave(puller.session_id)
    stay, expire = await settled_keys(client)
    assert stay - before <= {KEYS.clock, KEYS.counters, META}
    assert live_counts(await client.hgetall(KEYS.counters)) == {}
    families = {key.removeprefix(KEYS.prefix).split(":")[0] for key in expire}
    assert families <= {"job", "service"}
    assert len([key for key in expire if ":job:" in key]) == 61


@pytest.fixture
async def full(real_backend: ServerBackend) -> AsyncIterator[Server]:
    """A real server whose memory limit can be closed in on it."""
    yield real_backend.server
    real_backend.server.ask("CONFIG", "SET", "maxmemory", "0")


async def test_full_memory_refuses_new_work_and_finishes_the_old(full: Server) -> None:
    """Out of memory an enqueue is refused at once with what to do; claims, answers, joins and counts go on."""
    broker = await Broker.connect(BrokerSettings(redis_url=full.url))
    worker = await Puller(broker).join()
    client = full.client(protocol=2)
    listener = await Listener(client).open()
    jobs = [make_job(body=b"x" * 20_000, reply_to=listener.router) for _ in range(8)]
    await asyncio.gather(*map(broker.jobs.enqueue, jobs))
    running = await worker.claim(4)
    full.ask("CONFIG", "SET", "maxmemory", "1")
    refused = make_job()
    with pytest.raises(BrokerFull, match="free memory") as refusal:
        await broker.jobs.enqueue(refused)
    assert refusal.value.retry_after_s
    newcomer = await Puller(broker).join()
    running += await newcomer.claim(4)
    await broker.workers.renew(worker.session_id)
    for lease in running:
        assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    assert len(await listener.received()) == 8
    assert await broker.stats.depths() == {}
    full.ask("CONFIG", "SET", "maxmemory", "0")
    assert await broker.jobs.enqueue(refused) is State.QUEUED
    await client.aclose()
    await broker.close()


async def test_dead_letters_are_bounded(broker: Broker, worker: Puller, client: Any) -> None:
    """Past their bytes the oldest dead letters go first; their bytes are counted exactly."""
    for number in range(3):
        await broker.jobs.enqueue(make_job(max_attempts=1, body=b"%d" % number))
        await broker.attempts.release(await worker.claim_one(), "broken", counted=True)
    letters = await client.xrange(KEYS.dead)
    sizes = [int(fields[b"size"]) for _, fields in letters]
    assert int(await client.hget(KEYS.budget, "dead:bytes")) == sum(sizes)
    # As if much larger letters had come before: the sweep drops the oldest until the bound holds.
    await client.hset(KEYS.budget, "dead:bytes", 256 * 1024 * 1024 + sizes[0])
    await broker.maintenance.expire()
    left = [entry.decode() for entry, _ in await client.xrange(KEYS.dead)]
    requests = [Job.unpack(await client.get(KEYS.dead_request(entry))) for entry in left]
    assert [request.body for request in requests] == [b"1", b"2"]
    assert not await client.exists(KEYS.dead_request(letters[0][0].decode()))


async def test_a_larger_attempt_bound_is_each_jobs_own(broker: Broker, worker: Puller) -> None:
    """``max_attempts`` travels with the job."""
    job = replace(make_job(), max_attempts=1)
    await broker.jobs.enqueue(job)
    await broker.attempts.release(await worker.claim_one(), "broken", counted=True)
    assert await broker.jobs.enqueue(job) is State.DEAD
