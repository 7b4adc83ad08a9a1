"""Two versions of the fabric on one server, as in a rolling upgrade: whoever enqueues, runs or takes back a job may be
of the one or of the other.

The previous version is its own scripts, kept word for word in ``tests/golden/previous_scripts.json.xz`` (by name),
called with the arguments that its roles gave them. When a release is made, its scripts replace them (``python -m
tests.contract.test_two_versions`` writes them), and :class:`Previous` is made to call them as that release does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from broker import Broker
from broker.redis.scripts import RECORD, load_scripts
from broker.redis.server_checks import CONTRACT
from queue_schemas import (
    LANES,
    ControlKind,
    Frame,
    Job,
    Lane,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    SessionId,
    Settled,
    State,
    parse_control,
)
from queue_schemas.ids import encode_name
from queue_schemas.keys import MANAGER, ShardKeys
from tests.support.queue import MODEL, Backend, Puller, answer_frame, live_counts, make_job

from .conftest import Listener

KEYS = ShardKeys(0)
GOLDEN = Path(__file__).parents[1] / "golden" / "previous_scripts.json.xz"
_ATTEMPTS = itertools.count(1)


class Version(Protocol):
    """What one version's roles do to a queue. A worker's session id belongs to the version that it runs."""

    async def join(self, worker: SessionId) -> None: ...
    async def enqueue(self, job: Job) -> str: ...
    async def cancel(self, job: Job) -> str: ...
    async def claim(self, worker: SessionId) -> list[Lease]: ...
    async def renew(self, worker: SessionId) -> bool: ...
    async def settle(self, lease: Lease) -> str: ...
    async def release(self, lease: Lease, *, counted: bool) -> str: ...
    async def reclaim(self, worker: SessionId) -> int: ...
    async def expire(self) -> int: ...
    async def act(self, manager: str) -> int: ...


class Present:
    """This version."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._pullers: dict[SessionId, Puller] = {}

    async def join(self, worker: SessionId) -> None:
        self._pullers[worker] = await Puller(self._broker, worker).join()

    async def enqueue(self, job: Job) -> str:
        return await self._broker.jobs.enqueue(job)

    async def cancel(self, job: Job) -> str:
        return str(await self._broker.jobs.cancel(job.id, "the client left"))

    async def claim(self, worker: SessionId) -> list[Lease]:
        return await self._pullers[worker].claim(1)

    async def renew(self, worker: SessionId) -> bool:
        await self._broker.workers.renew(worker)
        return True

    async def settle(self, lease: Lease) -> str:
        return await self._broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))

    async def release(self, lease: Lease, *, counted: bool) -> str:
        return await self._broker.attempts.release(lease, "it drains", counted=counted)

    async def reclaim(self, worker: SessionId) -> int:
        taken = await self._broker.maintenance.reclaim(worker)
        return taken.requeued + taken.lost

    async def expire(self) -> int:
        return (await self._broker.maintenance.expire()).expired

    async def act(self, manager: str) -> int:
        return await self._broker.fleet.acquire_leader_lease(manager, 50) or 0


class Previous:
    """The version before, called as its roles did."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.scripts: dict[str, str] = json.loads(lzma.decompress(GOLDEN.read_bytes()))
        self._claims: dict[SessionId, tuple[int, int]] = {}

    async def _run(self, name: str, *args: Any, key: str = KEYS.budget) -> Any:
        given = args if name == "act_as_manager" else (KEYS.prefix, *args)
        return await self._client.eval(self.scripts[name], 1, key, *given)

    async def join(self, worker: SessionId) -> None:
        self._claims[worker] = (0, 0)
        await self._run("join", worker)

    async def enqueue(self, job: Job) -> str:
        (answer,) = await self._run(
            "enqueue", 100, 1 << 30, 100, 1 << 30, 1 << 30, f"previous{next(_ATTEMPTS)}",
            job.id, job.pack(), encode_name(job.model), job.lane.value, job.band, encode_name(job.tenant),
            job.reply_to, int(job.persisted), job.ttl_ms, job.max_attempts,
            encode_name(job.region), job.remote_after_ms,
            int(job.on_loss == "continue" and job.stream), max(job.cost_estimate, 1), job.weight, "", *("",) * 6,
            job.affinity,
        )  # fmt: skip
        return str(answer.decode())

    async def cancel(self, job: Job) -> str:
        return str((await self._run("cancel", job.id, "the client left", 0, 0)).decode())

    async def claim(self, worker: SessionId) -> list[Lease]:
        seq, turn = self._claims[worker]
        base = f"previous{next(_ATTEMPTS)}"
        lanes = ",".join(LANES)
        reply = await self._run("claim", worker, seq + 1, turn, 1, 0, 0, base, 30_000, "", 0, encode_name(MODEL), lanes)
        assert reply[0] == b"ok"
        leases = [
            Lease(Job.unpack(envelope), epoch, attempt_id.decode(), attempt, remaining_ms, waited_ms)
            for _, envelope, epoch, attempt_id, attempt, remaining_ms, waited_ms, *_ in reply[4:]
        ]
        self._claims[worker] = (seq + 1, turn + len(leases))
        return leases

    async def renew(self, worker: SessionId) -> bool:
        return int(await self._run("renew", worker, "0")) > 0

    async def settle(self, lease: Lease) -> str:
        attempt = (lease.job.id, lease.epoch, lease.attempt_id)
        (answer,) = await self._run("settle", *attempt, "done", "", "", 0, 0, 1, answer_frame(lease))
        return str(answer.decode())

    async def release(self, lease: Lease, *, counted: bool) -> str:
        attempt = (lease.job.id, lease.epoch, lease.attempt_id)
        (answer,) = await self._run("release", *attempt, int(counted), "it drains", "")
        return str(answer.decode())

    async def reclaim(self, worker: SessionId) -> int:
        requeued, _, _, left, lost = await self._run("reclaim", worker, 1, 256, "its worker is dead")
        assert left == 0
        return int(requeued + lost)

    async def expire(self) -> int:
        return int((await self._run("expire", 256, 0))[0])

    async def act(self, manager: str) -> int:
        return int(await self._run("act_as_manager", manager, 50, key=MANAGER))


ROLES = ("router", "worker", "manager")
MIXED = [
    pytest.param(*who, id="-".join(f"{version}_{role}" for version, role in zip(who, ROLES, strict=True)))
    for who in itertools.product(("old", "new"), repeat=3)
    if len(set(who)) > 1
]


class Fabric:
    """Routers, workers and Managers of two versions on one server."""

    def __init__(self, broker: Broker, listener: Listener, client: Any) -> None:
        self.broker = broker
        self.versions: dict[str, Version] = {"old": Previous(client), "new": Present(broker)}
        self.listener = listener
        self.client = client
        self._number = itertools.count(1)

    async def worker(self, version: str) -> SessionId:
        """A worker of that version, joined."""
        worker = SessionId(f"{version}.{next(self._number):016x}")
        await self.versions[version].join(worker)
        return worker

    def job(self, **fields: Any) -> Job:
        return make_job(reply_to=self.listener.router, **fields)

    async def answered(self, job: Job) -> None:
        """The job's answer has come, once, and nothing else."""
        (frame,) = await self.listener.received()
        assert isinstance(frame, Frame)
        assert (frame.job_id, frame.data) == (job.id, b"answer")

    async def is_empty(self) -> None:
        """Nothing waits or runs, nothing is owed."""
        for key in (KEYS.budget, KEYS.deadlines):
            assert not await self.client.exists(key), key
        assert live_counts(await self.client.hgetall(KEYS.counters)) == {}
        for pattern in ("q:*", "retry:*", "suspects:*", "leases:*", "active:*"):
            assert await self.client.keys(KEYS.prefix.replace("{", "[{]") + pattern) == []


@pytest.fixture
async def fabric(backend: Backend, broker: Broker, listener: Listener, client: Any) -> Fabric:
    """Both versions on the empty server."""
    return Fabric(broker, listener, client)


@pytest.mark.parametrize(("router", "worker", "manager"), MIXED)
async def test_a_job_is_served_lost_handed_back_and_ended_by_any_mix(
    fabric: Fabric, router: str, worker: str, manager: str
) -> None:
    """Enqueued by the one, run by the other, taken back by either: one answer, late calls fenced, nothing left over."""
    routers, workers, managers = (fabric.versions[version] for version in (router, worker, manager))
    other = "old" if worker == "new" else "new"
    first, second = await fabric.worker(worker), await fabric.worker(other)

    served = fabric.job()
    assert await workers.claim(first) == []
    assert await routers.enqueue(served) == "queued"
    assert await routers.enqueue(served) == "queued"
    said = [fields for _, fields in await fabric.client.xrange(KEYS.control(first)) if fields.get(b"k") != b"hello"]
    told = [parse_control(fields).kind for fields in said]
    assert told == [ControlKind.WAKE]
    (lease,) = await workers.claim(first)
    assert (lease.job, lease.epoch, lease.attempt) == (served, 1, 1)
    assert await workers.settle(lease) == "ok"
    assert await workers.settle(lease) == "duplicate"
    await fabric.answered(served)

    lost = fabric.job()
    await routers.enqueue(lost)
    (late,) = await workers.claim(first)
    assert await managers.reclaim(first) == 1
    assert await managers.reclaim(first) == 0
    marker = await fabric.listener.marker()
    assert (marker.kind, marker.job_id, marker.epoch) == (MarkerKind.REQUEUED, lost.id, 2)
    (again,) = await fabric.versions[other].claim(second)
    assert (again.job, again.epoch, again.attempt) == (lost, 2, 2)
    assert await workers.settle(late) == "fenced"
    assert await fabric.versions[other].settle(again) == "ok"
    await fabric.answered(lost)

    third = await fabric.worker(worker)
    numbers = []
    for _ in range(2):
        assert await workers.renew(third)
        numbers.append(int(await fabric.client.hget(KEYS.renewals, third)))
    assert numbers[1] > numbers[0]
    back = fabric.job()
    await routers.enqueue(back)
    (held,) = await fabric.versions[other].claim(second)
    assert await fabric.versions[other].release(held, counted=False) == "ok"
    assert (await fabric.listener.marker()).kind is MarkerKind.REQUEUED
    (taken,) = await workers.claim(third)
    assert (taken.epoch, taken.attempt) == (2, 1)
    assert await workers.settle(taken) == "ok"
    await fabric.answered(back)

    waiting, running, brief = fabric.job(), fabric.job(), fabric.job(ttl_ms=30)
    await routers.enqueue(running)
    (aborted,) = await workers.claim(third)
    await routers.enqueue(waiting)
    assert await routers.cancel(waiting) == "queued"
    assert await routers.cancel(running) == "leased"
    assert await workers.settle(aborted) in ("fenced", "gone")
    await routers.enqueue(brief)
    await asyncio.sleep(0.05)
    assert await managers.expire() == 1
    kinds = [news.kind for news in await fabric.listener.received() if isinstance(news, Marker)]
    assert kinds == [MarkerKind.CANCELLED, MarkerKind.CANCELLED, MarkerKind.EXPIRED]
    await fabric.is_empty()


@pytest.mark.parametrize("manager", ["old", "new"])
async def test_a_stream_of_a_new_router_survives_the_loss_of_an_old_worker(fabric: Fabric, manager: str) -> None:
    """Whoever takes it back: it waits for its Router to say what was delivered, then either version runs it."""
    new, old = fabric.versions["new"], fabric.versions["old"]
    victim, other = await fabric.worker("old"), await fabric.worker("new")
    job = fabric.job(stream=True, on_loss="continue")
    await new.enqueue(job)
    await old.claim(victim)
    assert await fabric.versions[manager].reclaim(victim) == 1
    marker = await fabric.listener.marker()
    assert (marker.kind, marker.epoch) == (MarkerKind.LOST, 2)
    assert await new.claim(other) == []
    assert await fabric.broker.jobs.resume(job, 2) is State.QUEUED
    (lease,) = await new.claim(other)
    assert await new.settle(lease) == "ok"
    await fabric.is_empty()


async def test_a_job_that_may_yield_is_run_by_either_version(fabric: Fabric) -> None:
    """The one before hands it back as any other, and goes on behind what it said where it yielded to the new one."""
    new, old = fabric.versions["new"], fabric.versions["old"]
    before, after = await fabric.worker("old"), await fabric.worker("new")
    job = fabric.job(lane=Lane.BATCH, yields=2)
    await new.enqueue(job)
    (first,) = await old.claim(before)
    assert await old.release(first, counted=False) == "ok"
    (second,) = await new.claim(after)
    assert (second.job, second.epoch, second.attempt) == (job, 2, 1)
    following = replace(job, prefix="Once", yields=1)
    assert await fabric.broker.attempts.release_yielded(second, "it yields", following) is Settled.OK
    (third,) = await old.claim(before)
    assert (third.job.prefix, third.epoch, third.attempt) == ("Once", 3, 1)
    assert await old.settle(third) == "ok"
    await fabric.is_empty()


def test_both_versions_read_each_others_records(fabric: Fabric) -> None:
    """A record with other fields is no job to the other version, which drops it: that needs a contract of its own."""
    previous = Previous(fabric.client)
    pattern = f"'^{' '.join(['(%S*)'] * len(RECORD))}$'"
    assert CONTRACT == "2"
    assert all(pattern in text for text in previous.scripts.values() if "parse_record" in text)


async def test_managers_of_two_versions_take_turns(fabric: Fabric) -> None:
    """One acts, the term rises with each change, and neither is kept out for longer than the other's lease."""
    old, new = fabric.versions["old"], fabric.versions["new"]
    assert await old.act("before") == 1
    assert await new.act("after") == 0
    await asyncio.sleep(0.06)
    assert await new.act("after") == 2
    assert await old.act("before") == 0
    await asyncio.sleep(0.06)
    assert await old.act("before") == 3


if __name__ == "__main__":
    texts = {name: script.source for name, script in load_scripts(flags=False).items()}
    GOLDEN.write_bytes(lzma.compress(json.dumps(texts).encode()))
