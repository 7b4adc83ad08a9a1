"""The queue as tests see it: a backend to connect to, jobs at hand, a worker that only pulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fakeredis

from broker import Broker, BrokerSettings, Budgets
from broker.redis.scripts import RECORD
from queue_schemas import (
    END,
    HEAD,
    LANES,
    Control,
    ControlKind,
    Frame,
    Job,
    Lane,
    Lease,
    Pool,
    SessionId,
    Tenant,
    new_job_id,
    new_session_id,
    shard_of_pool,
)

from .servers import Server

MODEL = Pool("sim/tiny:v1")
"""A model id with everything that key names must encode."""


def make_job(*, model: str = MODEL, tenant: str = "acme", shards: int = 1, **fields: Any) -> Job:
    """A small job; any field of the envelope may be given."""
    shard = shard_of_pool(model, shards)
    defaults: dict[str, Any] = {"id": new_job_id(shard), "path": "/v1/chat/completions", "body": b'{"n":1}'}
    return Job(model=Pool(model), tenant=Tenant(tenant), **(defaults | fields))


def answer_frame(lease: Lease, data: bytes = b"answer", seq: int = 0) -> bytes:
    """The packed frame of a plain answer."""
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, HEAD | END, data, 200, "application/json").pack()


def parse_record(held: bytes) -> dict[str, str]:
    """What the packed record of a job says, or the tombstone of one that has ended."""
    return dict(zip(RECORD, held.decode().split(" "), strict=False))


async def record_of(client: Any, key: str) -> dict[str, str]:
    """What stands at the key of a job, or of one that has ended; empty if there is nothing."""
    transaction = client.pipeline(transaction=True)  # in between the job could end
    transaction.get(key)
    transaction.hget(key, "record")
    tombstone, record = await transaction.execute(raise_on_error=False)  # one of them is WRONGTYPE
    held = record if isinstance(tombstone, Exception) else tombstone
    return parse_record(held) if held else {}


async def change_record(client: Any, key: str, **fields: object) -> None:
    """Have the record of a job say something else."""
    changed = await record_of(client, key) | {name: str(value) for name, value in fields.items()}
    await client.hset(key, "record", " ".join(changed[name] for name in RECORD))


def live_counts(counters: Mapping[bytes, bytes]) -> dict[str, int]:
    """What a shard's counters say of jobs that have not ended, as far as it is not zero."""
    return {
        name.decode(): int(number)
        for name, number in counters.items()
        if name.endswith((b":waiting", b":leased", b":turn")) and int(number)
    }


@dataclass
class Puller:
    """A worker without an engine: joins, claims with a rising ``seq`` and counts its turns, as real ones do."""

    broker: Broker
    session_id: SessionId = field(default_factory=lambda: new_session_id("puller"))
    shard: int = 0
    seq: int = 0
    turn: int = 0
    region: str = ""
    others: bool = True
    received: int = 0
    """Jobs that it was handed without a claim, and has read of."""
    _read_to: str = "0"

    async def join(self) -> Puller:
        """Enter the fabric; nothing that was said before is read."""
        await self.broker.workers.join(self.session_id)
        await self.control_messages()
        return self

    async def claim(
        self,
        n: int = 1,
        models: Sequence[str] = (MODEL,),
        lanes: Sequence[Lane] = LANES,
        *,
        offer: int = 0,
        slots: int = 0,
        capacity: int = 0,
    ) -> list[Lease]:
        """A new claim, with an ``offer`` to be handed jobs, of a worker that has no more ``slots`` unless these are
        said."""
        self.seq += 1
        pools = [(Pool(model), lanes) for model in models]
        claimed = await self.broker.workers.claim(
            self.shard, self.session_id, self.seq, self.turn, n, pools, self.region,
            others=self.others, offer=offer, received=self.received, slots=slots or offer, capacity=capacity,
        )  # fmt: skip
        self.turn += len(claimed.leases)
        return list(claimed.leases)

    async def claim_one(self, **options: Any) -> Lease:
        """A new claim that must give a job."""
        (lease,) = await self.claim(1, **options)
        return lease

    async def handed(self) -> list[Lease]:
        """The jobs that it was handed since the last call."""
        jobs = [message for message in await self.control_messages() if message.kind is ControlKind.JOB]
        self.received += len(jobs)
        return [job.lease for job in jobs if job.lease is not None]

    async def control_messages(self, block_ms: int = 1) -> list[Control]:
        """The control messages since the last call."""
        messages = await self.broker.workers.read_control(self.shard, self.session_id, self._read_to, block_ms)
        if messages:
            self._read_to = messages[-1][0]
        return [message for _, message in messages if message is not None]


class Backend:
    """One kind of server, emptied for each test."""

    kind = ""
    real = True

    async def connect(self, *, shards: int = 1, budgets: Budgets | None = None) -> Broker:
        """A new broker, as another process would have."""
        raise NotImplementedError

    def client(self) -> Any:
        """A raw redis-py client, to look."""
        raise NotImplementedError


@dataclass
class ServerBackend(Backend):
    """A real server."""

    server: Server
    kind: str

    async def connect(self, *, shards: int = 1, budgets: Budgets | None = None) -> Broker:
        settings = BrokerSettings(redis_url=self.server.url, shards=shards, retry_limit_ms=3_000)
        return await Broker.connect(settings, budgets=budgets)

    def client(self) -> Any:
        return self.server.client(protocol=2)


@dataclass
class FakeBackend(Backend):
    """fakeredis, in this process: the scripts without a server."""

    kind = "fakeredis"
    real = False
    server: fakeredis.FakeServer = field(default_factory=fakeredis.FakeServer)

    async def connect(self, *, shards: int = 1, budgets: Budgets | None = None) -> Broker:
        return Broker.over(self.client(), shards=shards, budgets=budgets, retry_limit_ms=3_000)

    def client(self) -> Any:
        return fakeredis.FakeAsyncRedis(server=self.server, protocol=2)
