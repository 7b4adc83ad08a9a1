"""What a Router does for workers over HTTP besides passing their calls on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from queue_schemas import (
    Assignment,
    BrokerUnavailable,
    Claimed,
    Job,
    JobId,
    Lease,
    PermissionRefused,
    Pool,
    RegistrationAnswer,
    SessionId,
    Settled,
    Tenant,
)
from queue_schemas.worker_protocol.messages import ClaimCall, Decline, Join
from router.lifecycle import Lifecycle
from router.queue_link import QueueLink
from router.workers import service as module
from router.workers.membership import Membership, Registry
from router.workers.rules import WorkerScope
from router.workers.service import WorkerService

SESSION = SessionId("edge.0123456789abcdef")
SCOPE = WorkerScope(name="edge", slots=4)


class Queue:
    """One shard; ``unjoined`` are those that do not answer a join."""

    def __init__(self) -> None:
        self.shards = 1
        self.unjoined: set[int] = set()
        self.forgotten: list[str] = []
        self.leases: list[Lease] = []
        self.agreed = b"s" * 32
        self.settled = Settled.OK
        self.declined = 0
        self.workers = self.signed_leases = self.attempts = self

    async def join(self, _: SessionId) -> set[int]:
        return self.unjoined

    async def forget(self, session_id: SessionId) -> None:
        self.forgotten.append(session_id)

    async def secret(self, _: bytes) -> bytes:
        await asyncio.sleep(0)
        return self.agreed

    async def held(self, _shard: int, _session_id: SessionId) -> int:
        held = len(self.leases)
        await asyncio.sleep(0.001)
        return held

    async def claim(
        self, _shard: int, _session: SessionId, seq: int, _turn: int, n: int, *_: Any, **__: Any
    ) -> Claimed:
        await asyncio.sleep(0.001)
        given = []
        for number in range(n):
            job = Job(
                id=JobId(f"0-{seq:016x}{number:016x}"),
                tenant=Tenant("acme"),
                model=Pool("m"),
                path="/v1/completions",
                body=b"{}",
                reply_to="router.0123456789abcdef",
            )
            given.append(Lease(job, 1, "a" * 13, 1, 1_000, 0))
        self.leases += given
        return Claimed(tuple(given), n == 0)

    async def append(self, _: Lease, frames: bytes) -> Settled:
        assert frames == b""
        return self.settled

    async def decline_to_yield(self, *_: Any, **__: Any) -> None:
        self.declined += 1


class Registered:
    async def register(self, *_: object) -> RegistrationAnswer:
        assignment = Assignment(term=1, version=1)
        return RegistrationAnswer(
            shards=1, lease_ms=1_000, heartbeat_interval_ms=100, broker_url="redis://inside", assignment=assignment
        )


def service(queue: Queue) -> WorkerService:
    link = cast(QueueLink, SimpleNamespace(queue=queue))
    membership = cast(Membership, Registered())
    lifecycle = cast(Lifecycle, SimpleNamespace(shutting_down=False))
    return WorkerService(link, membership, Registry(), lifecycle, max_answer_bytes=1_000)


def claim(seq: int, n: int) -> ClaimCall:
    return ClaimCall.model_validate({"claim": {"seq": seq, "n": n, "pools": [{"pool": "m"}]}})


async def test_a_session_joins_all_shards_or_none() -> None:
    """Another Router, which it may call next, does not know where it is missing. Nobody is told of Redis."""
    queue = Queue()
    mine = service(queue)
    join = Join(worker_id="edge", session_id=SESSION, models=["m"], slots=1)
    queue.unjoined = {0}
    with pytest.raises(BrokerUnavailable, match="0"):
        await mine.join(SCOPE, join, "req_1")
    assert queue.forgotten == [SESSION]
    queue.unjoined = set()
    answer = await mine.join(SCOPE, join, "req_1")
    assert isinstance(answer, dict)
    assert answer["broker_url"] == ""


async def test_claims_at_the_same_time_fill_no_more_slots_than_one_after_the_other() -> None:
    """Each looks for room only when those before it have their jobs."""
    queue = Queue()
    mine = service(queue)
    answers = await asyncio.gather(*(mine.claim(SCOPE, SESSION, claim(seq, 2)) for seq in range(1, 21)))
    assert sum(len(answer["claimed"]["jobs"]) for answer in answers) == 4
    assert len(mine._claiming) == 0


async def test_a_lease_that_is_held_no_more_keeps_no_job_from_yielding() -> None:
    """Nor does it show anything of its job."""
    queue = Queue()
    mine = service(queue)
    token = (await mine.claim(SCOPE, SESSION, claim(1, 1)))["claimed"]["jobs"][0]["lease"]
    await mine.decline(SCOPE, SESSION, Decline(lease=token, for_now=False))
    for settled in (Settled.FENCED, Settled.DUPLICATE, Settled.GONE):
        queue.settled = settled
        with pytest.raises(PermissionRefused):
            await mine.decline(SCOPE, SESSION, Decline(lease=token, for_now=False))
        with pytest.raises(PermissionRefused):
            await mine.delivered(SESSION, token)
    assert queue.declined == 1


async def test_routers_agree_on_a_secret_again_when_the_queue_has_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of before stay valid, and new ones are read by those who know the new secret alone."""
    monkeypatch.setattr(module, "SECRET_INTERVAL_S", 0.005)
    queue = Queue()
    mine = service(queue)
    old = (await mine.claim(SCOPE, SESSION, claim(1, 1)))["claimed"]["jobs"][0]["lease"]
    agreeing = asyncio.create_task(mine.keep_agreeing())
    queue.agreed = b"t" * 32
    await asyncio.sleep(0.05)
    new = (await mine.claim(SCOPE, SESSION, claim(2, 1)))["claimed"]["jobs"][0]["lease"]
    agreeing.cancel()
    other = service(queue)
    assert [await _takes(other, token) for token in (old, new)] == [False, True]
    assert [await _takes(mine, token) for token in (old, new)] == [True, True]


async def _takes(at: WorkerService, token: str) -> bool:
    try:
        await at.decline(SCOPE, SESSION, Decline(lease=token, for_now=True))
    except PermissionRefused:
        return False
    return True
