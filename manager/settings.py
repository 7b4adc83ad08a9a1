"""The Manager's settings, from files, environment and flags. Those of the queue are :class:`broker.BrokerSettings`."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from queue_schemas import BadMessage
from queue_schemas.fleet.acting_manager import check_manager_url
from queue_schemas.fleet.messages import MAX_WORKERS
from scheduling.placement import PoolRules
from telemetry import CommaList, HeaderSecret, RoleSettings
from telemetry.settings import JsonTable


class PlacementRules(BaseModel):
    """What is declared of one pool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
    max_workers: int = Field(default=MAX_WORKERS, ge=0, le=MAX_WORKERS)
    start_s: float = Field(default=60.0, ge=0.1, le=3_600)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError("min_workers must be at most max_workers")
        return self

    @property
    def rules(self) -> PoolRules:
        return PoolRules(min_workers=self.min_workers, max_workers=self.max_workers, start_s=self.start_s)


class ManagerSettings(RoleSettings):
    """Table ``[manager]``, environment ``INFERQ_MANAGER_*``."""

    table: ClassVar[str] = "manager"

    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(9000, ge=0, le=65_535, description="TCP port to listen on; 0 takes a free one")
    join_token: HeaderSecret = Field(
        SecretStr(""), description="Secret that workers and Routers must show; required on a public address"
    )
    insecure: bool = Field(False, description="Listen on a public address without a join token")
    advertise_url: str = Field(
        "",
        description="URL at which Routers and other Managers reach this one, written into Redis while it acts; empty: "
        "from host and port (for a wildcard host, its address on the way to Redis)",
    )
    advertised_redis_url: str = Field(
        "", description="Redis URL that workers and Routers are given; empty: the one that the Manager uses"
    )
    pools: CommaList = Field(default_factory=list, description="Models that are known even before a worker serves them")
    placement: JsonTable[PlacementRules] = Field(
        default_factory=dict,
        description="What workers with several installed models are told to load: by model, the least and most workers "
        "and how many seconds one takes to load it, as JSON or a table: "
        '{"m": {"min_workers": 1, "max_workers": 4, "start_s": 60}}',
    )
    data_dir: str = Field(".inferq", description="Folder of the embedded queue server, when no Redis URL is given")
    lease_ms: int = Field(
        15_000, ge=300, description="A worker whose renewal counter stands still for this long loses its jobs"
    )
    heartbeat_interval_ms: int = Field(2_000, ge=50, description="How often workers send a heartbeat")
    unresponsive_after_ms: int = Field(
        6_000, ge=100, description="A worker without a heartbeat for this long is given no new queues"
    )
    leader_lease_ms: int = Field(
        6_000, ge=200, description="How long the acting Manager's leader lease lasts without a renewal"
    )
    sweep_interval_ms: int = Field(
        1_000, ge=20, le=5_000, description="How often renewal counters are read and deadlines enforced"
    )
    ping_timeout_ms: int = Field(
        500, ge=50, le=5_000, description="How long a worker that is checked may take to answer a ping"
    )
    probe_timeout_ms: int = Field(1_000, ge=50, le=10_000, description="Limit on a probe of a worker's health page")
    broker_timeout_ms: int = Field(2_000, ge=50, description="Limit on one call of the Manager to the queue's Redis")
    shutdown_timeout_ms: int = Field(
        5_000, ge=1_000, description="How long running requests may take to finish at shutdown"
    )

    @property
    def probe_timeout_s(self) -> float:
        """Limit on a probe: short beside the lease, or probes would interrupt the watch of the renewal counters."""
        return min(self.probe_timeout_ms, self.lease_ms / 6) / 1000

    @field_validator("advertise_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        try:
            return check_manager_url(value) if value else value
        except BadMessage as error:
            raise ValueError(error.message) from error

    @model_validator(mode="after")
    def _in_proportion(self) -> Self:
        if self.unresponsive_after_ms < 2 * self.heartbeat_interval_ms:
            raise ValueError(
                "unresponsive_after_ms must be at least twice heartbeat_interval_ms: one heartbeat may be late"
            )
        if self.sweep_interval_ms * 4 > self.lease_ms:
            raise ValueError(
                "sweep_interval_ms must be at most a quarter of lease_ms: each lease is checked several times"
            )
        return self
