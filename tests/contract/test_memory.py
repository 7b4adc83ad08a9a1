"""Nothing is lost, nothing is left over: conservation, budgets and memory after any mix of operations."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from broker import Broker, BrokerSettings, Budgets
from queue_schemas import (
    BANDS,
    LANES,
    BrokerFull,
    Fenced,
    Job,
    Lane,
    Lease,
    Outcome,
    Settled,
    State,
    new_job_id,
)
from queue_schemas.keys import META, ShardKeys
from tests.support.queue import MODEL, Puller, ServerBackend, answer_frame, make_job
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
        await broker.enqueue(job)
    leases = await worker.claim(3)
    await broker.release(leases[0], "draining", counted=False)
    await broker.release(leases[1], "broken", counted=True)
    idle = await Puller(broker).join()
    assert await idle.claim(lanes=[Lane.BATCH]) == []
    rival = make_job(tenant="rival")
    await broker.enqueue(rival)
    await worker.claim(1)
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
        *(KEYS.leases(puller.incarnation) for puller in (worker, idle)),
        *(KEYS.claimed(puller.incarnation) for puller in (worker, idle)),
        *(KEYS.control(puller.incarnation) for puller in (worker, idle)),
        *(KEYS.parked(MODEL, lane) for lane in LANES),
        KEYS.reply(listener.router),
        *(KEYS.beats, KEYS.deadlines, KEYS.dead, KEYS.budget, KEYS.depth, KEYS.totals, KEYS.turns),
    }
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
    await asyncio.gather(*map(broker.enqueue, jobs))
    await broker.cancel(jobs[0].id, "gone")
    await broker.cancel(new_job_id(0), "unknown")
    ended, handed_back = 1, set()
    while ended < 60:
        for puller in pullers:
            for turn, lease in enumerate(await puller.claim(4)):
                if turn == 0 and lease.job.id not in handed_back:
                    handed_back.add(lease.job.id)
                    await broker.release(lease, "draining", counted=False)
                else:
                    await broker.settle(lease, Outcome.DONE, answer_frame(lease))
                    ended += 1
    for puller in pullers:
        assert await puller.claim(2) == []
        await broker.leave(puller.incarnation)
    stay, expire = await settled_keys(client)
    assert stay - before <= {KEYS.totals, KEYS.turns, META}
    families = {key.removeprefix(KEYS.prefix).split(":")[0] for key in expire}
    assert families <= {"job", "service"}
    assert len([key for key in expire if ":job:" in key]) == 61


@dataclass
class Model:
    """What the queue should hold, as a dictionary and a few counters."""

    budgets: Budgets
    states: dict[str, State] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    leases: dict[str, tuple[Lease, Puller]] = field(default_factory=dict)
    stale: list[Lease] = field(default_factory=list)

    def live(self) -> int:
        return sum(state in (State.QUEUED, State.LEASED) for state in self.states.values())

    def enqueue(self, job: Job) -> State:
        self.jobs[job.id] = job
        self.attempts.setdefault(job.id, 0)
        return self.states.setdefault(job.id, State.QUEUED)

    def lose(self, lease: Lease, *, counted: bool) -> None:
        job_id = lease.job.id
        self.leases.pop(job_id)
        self.stale.append(lease)
        self.attempts[job_id] = lease.attempt if counted else lease.attempt - 1
        dead = self.attempts[job_id] >= lease.job.max_attempts
        self.states[job_id] = State.DEAD if dead else State.QUEUED

    def end(self, job_id: str, state: State) -> None:
        if job_id in self.leases:
            self.stale.append(self.leases.pop(job_id)[0])
        self.states[job_id] = state


@pytest.mark.parametrize("seed", range(4))
async def test_any_mix_of_operations_agrees_with_a_model(broker: Broker, client: Any, seed: int) -> None:
    """Hundreds of random operations: every answer is the model's, and at the end enqueued = live + terminal."""
    dice = random.Random(seed)
    model = Model(Budgets())
    pullers = [await Puller(broker).join() for _ in range(3)]
    for _ in range(300):
        action = dice.choice(["enqueue"] * 5 + ["claim"] * 4 + ["settle"] * 3 + ["release", "cancel", "stale", "crash"])
        leased = dice.choice(list(model.leases.values())) if model.leases else None
        match action:
            case "enqueue":
                known = list(model.jobs.values())
                job = make_job(
                    tenant=dice.choice("abc"), lane=dice.choice(LANES), band=dice.randrange(BANDS), max_attempts=2
                )
                job = dice.choice(known) if known and dice.random() < 0.2 else job
                assert await broker.enqueue(job) is model.enqueue(job)
            case "claim":
                puller = dice.choice(pullers)
                wanted = dice.randrange(1, 5)
                leases = await puller.claim(wanted)
                waiting = [job_id for job_id, state in model.states.items() if state is State.QUEUED]
                assert len(leases) <= min(wanted, len(waiting))
                for lease in leases:
                    assert model.states[lease.job.id] is State.QUEUED
                    assert lease.attempt == model.attempts[lease.job.id] + 1
                    model.states[lease.job.id] = State.LEASED
                    model.leases[lease.job.id] = (lease, puller)
            case "settle" if leased:
                outcome = dice.choice(list(Outcome))
                assert await broker.settle(leased[0], outcome) is Settled.OK
                model.end(leased[0].job.id, State(outcome))
            case "release" if leased:
                counted = dice.random() < 0.5
                assert await broker.release(leased[0], "test", counted=counted) is Settled.OK
                model.lose(leased[0], counted=counted)
            case "cancel" if model.jobs:
                job_id = dice.choice(list(model.jobs.values())).id
                assert await broker.cancel(job_id, "test") is model.states[job_id]
                if model.states[job_id] in (State.QUEUED, State.LEASED):
                    model.end(job_id, State.CANCELLED)
            case "stale" if model.stale:
                answer = await broker.settle(dice.choice(model.stale), Outcome.DONE)
                assert answer in (Settled.FENCED, Settled.DUPLICATE)
            case "crash":
                victim = pullers.pop(dice.randrange(len(pullers)))
                await broker.reclaim(victim.incarnation)
                for lease, owner in list(model.leases.values()):
                    if owner is victim:
                        model.lose(lease, counted=True)
                with pytest.raises(Fenced):
                    await victim.claim()
                pullers.append(await Puller(broker).join())
    await _agrees(broker, client, model)


async def _agrees(broker: Broker, client: Any, model: Model) -> None:
    counted = [depth for lanes in (await broker.depths()).values() for depth in lanes.values()]
    states = list(model.states.values())
    assert sum(depth.waiting for depth in counted) == states.count(State.QUEUED)
    assert sum(depth.leased for depth in counted) == states.count(State.LEASED) == len(model.leases)
    totals: dict[str, int] = {}
    for (_, _, event), count in (await broker.totals()).items():
        totals[event] = totals.get(event, 0) + count
    ended = {state: states.count(state) for state in State if states.count(state)}
    assert totals["enqueued"] == len(states)
    assert {State(event): n for event, n in totals.items() if event not in ("enqueued", "requeued")} == {
        state: n for state, n in ended.items() if state not in (State.QUEUED, State.LEASED)
    }
    budget = {name.decode(): int(value) for name, value in (await client.hgetall(KEYS.budget)).items()}
    live = [model.jobs[job_id] for job_id, state in model.states.items() if state in (State.QUEUED, State.LEASED)]
    assert sum(n for name, n in budget.items() if name.startswith("t:") and name.endswith(":jobs")) == len(live)
    assert budget.get("p:sim%2Ftiny%3Av1:bytes", 0) == sum(len(job.pack()) for job in live)
    streams = 0
    async for key in client.scan_iter(match="*:q:*"):
        streams += await client.xlen(key)
    async for key in client.scan_iter(match="*:retry:*"):
        streams += await client.xlen(key)
    assert streams == states.count(State.QUEUED)
    assert await client.zcard(KEYS.deadlines) == len(live)


@pytest.fixture
async def full(real_backend: ServerBackend) -> AsyncIterator[Server]:
    """A real server whose memory limit can be closed in on it."""
    yield real_backend.server
    real_backend.server.ask("CONFIG", "SET", "maxmemory", "0")


async def test_full_memory_refuses_new_work_and_finishes_the_old(full: Server) -> None:
    """Out of memory an enqueue is refused at once with what to do; claims, answers, joins and figures go on."""
    broker = await Broker.connect(BrokerSettings(redis_url=full.url))
    worker = await Puller(broker).join()
    client = full.client(protocol=2)
    listener = await Listener(client).open()
    jobs = [make_job(body=b"x" * 20_000, reply_to=listener.router) for _ in range(8)]
    await asyncio.gather(*map(broker.enqueue, jobs))
    running = await worker.claim(4)
    full.ask("CONFIG", "SET", "maxmemory", "1")
    refused = make_job()
    with pytest.raises(BrokerFull, match="free memory") as refusal:
        await broker.enqueue(refused)
    assert refusal.value.retry_after_s
    newcomer = await Puller(broker).join()
    running += await newcomer.claim(4)
    await broker.renew(worker.incarnation)
    for lease in running:
        assert await broker.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    assert len(await listener.news()) == 8
    assert await broker.depths() == {}
    full.ask("CONFIG", "SET", "maxmemory", "0")
    assert await broker.enqueue(refused) is State.QUEUED
    await client.aclose()
    await broker.close()


async def test_dead_letters_are_bounded(broker: Broker, worker: Puller, client: Any) -> None:
    """Past their bytes the oldest dead letters go first; their bytes are counted exactly."""
    for number in range(3):
        await broker.enqueue(make_job(max_attempts=1, body=b"%d" % number))
        await broker.release(await worker.claim_one(), "broken", counted=True)
    letters = [fields for _, fields in await client.xrange(KEYS.dead)]
    sizes = [int(fields[b"size"]) for fields in letters]
    assert int(await client.hget(KEYS.budget, "dead:bytes")) == sum(sizes)
    # As if much larger letters had come before: the sweep drops the oldest until the bound holds.
    await client.hset(KEYS.budget, "dead:bytes", 256 * 1024 * 1024 + sizes[0])
    await broker.expire()
    assert [Job.unpack(fields[b"env"]).body for _, fields in await client.xrange(KEYS.dead)] == [b"1", b"2"]


async def test_a_larger_attempt_bound_is_each_jobs_own(broker: Broker, worker: Puller) -> None:
    """``max_attempts`` travels with the job."""
    job = replace(make_job(), max_attempts=1)
    await broker.enqueue(job)
    await broker.release(await worker.claim_one(), "broken", counted=True)
    assert await broker.enqueue(job) is State.DEAD
