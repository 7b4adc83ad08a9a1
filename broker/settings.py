"""Settings of the connection to Redis or Valkey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from telemetry.settings import RoleSettings

MAX_REPLY_BYTES = 64 << 20


class BrokerSettings(RoleSettings):
    """Where the queue lives and how long to wait for it. Table ``[broker]``, environment ``INFERQ_BROKER_*``."""

    table: ClassVar[str] = "broker"

    redis_url: str = Field(
        default="",
        description="redis://, rediss://, unix://, redis+sentinel://HOSTS/SERVICE or redis+cluster://HOSTS "
        "(rediss+... for TLS); empty: ask the Manager, or start the embedded server",
    )
    rq_redis_url: str = Field(
        default="",
        description="Redis of RQ's jobs (batches and webhooks): a plain server, no Cluster and no Sentinel; empty: the "
        "queue's Redis, where that is one",
    )
    shards: int = Field(default=1, ge=1, le=1024, description="number of shards, fixed for the life of the data")
    tls_ca_file: str = Field(default="", description="CA certificate to check the server's with; empty: the system's")
    connect_timeout_ms: int = Field(default=3_000, ge=1, description="limit on opening a connection")
    command_timeout_ms: int = Field(default=5_000, ge=1, description="silence of the server that ends a command")
    retry_limit_ms: int = Field(
        default=30_000, ge=0, le=50_000, description="how long a call is retried while Redis cannot be reached"
    )
    max_reply_bytes: int = Field(
        default=MAX_REPLY_BYTES,
        ge=8 << 20,
        description="what the reply stream of a Router that does not read may hold on a shard before workers pause the "
        "streams that they send it, in bytes of Redis's memory",
    )


Durability = Literal["memory", "disk"]
"""When background work is accepted: as soon as Redis has it, or once its append-only file is on the disk."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits on live jobs (waiting or running), their envelopes' bytes, and the bytes that are kept of persisted jobs
    and their output, checked at every enqueue."""

    tenant_jobs: int = 100_000
    tenant_bytes: int = 1 << 30
    pool_jobs: int = 200_000
    pool_bytes: int = 2 << 30
    tenant_persisted_bytes: int = 512 << 20
