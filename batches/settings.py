"""The batcher's settings. The queue's are in :class:`broker.BrokerSettings`, the store's in
:class:`storage.StorageSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from queue_schemas import BadMessage, check_worker_id
from telemetry import HeaderSecret, ManagerUrls, RequestSettings

MIB = 1024 * 1024


class BatchSettings(RequestSettings):
    """Table ``[batches]``, environment ``INFERQ_BATCHES_*``."""

    table: ClassVar[str] = "batches"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    host: str = Field("127.0.0.1", description="Address to listen on, for health and metrics")
    port: int = Field(7_500, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    batcher_id: str = Field("batcher", description="Name of this batcher in logs and among RQ's workers")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of Managers or Routers, which are asked in turn where Redis is unless redis_url says so",
    )
    join_token: HeaderSecret = Field(SecretStr(""), description="Shown to the Manager")
    scan_ms: int = Field(
        1_000, ge=20, le=60_000, description="How often new batches, and those whose batcher died, are looked for"
    )
    expiry_scan_ms: int = Field(
        60_000, ge=20, description="How often files and ended batches whose time is over are removed"
    )
    keep_batches_s: int = Field(
        2_592_000, ge=0, description="How long a batch is listed once it has ended; 0: for ever"
    )
    step_ms: int = Field(2_000, ge=10, le=8_000, description="How long one step of a batch takes while none else waits")
    shared_step_ms: int = Field(
        500, ge=10, le=8_000, description="The same while other batches wait for their step; less where many do"
    )
    lock_ms: int = Field(
        10_000, ge=500, le=60_000, description="After so long the step of a batcher that died counts as over"
    )
    max_lines: int = Field(50_000, ge=1, le=100_000_000, description="Most lines of a batch")
    max_line_bytes: int = Field(16 * MIB, ge=1024, le=96 * MIB, description="Longest line of an input file")
    model_wait_ms: int = Field(
        15_000, ge=0, description="How long a model that no worker has named yet is waited for before it is an error"
    )
    window_lines: int = Field(512, ge=1, le=50_000, description="Most lines of one batch on the queue at once")
    window_bytes: int = Field(8 * MIB, ge=1, description="Most bytes of them (a longer line goes alone)")
    max_attempts: int = Field(3, ge=1, le=100, description="How often a line is started before it is given up")
    busy_tries: int = Field(
        10, ge=1, le=50, description="How often a line is sent that engines answer with 429, 502, 503 or 504, in all"
    )
    busy_ms: int = Field(
        1_000, ge=10, le=60_000, description="Pause before it is sent again; doubled each time, up to a minute"
    )
    silence_ms: int = Field(
        30_000, ge=100, description="A line of which nothing was heard for so long is asked after on the queue"
    )
    reply_ttl_ms: int = Field(
        3_600_000,
        ge=10_000,
        description="How long answers are kept in Redis without a batcher; then lines that wait are cancelled there, "
        "and sent again later",
    )
    chunk_lines: int = Field(500, ge=1, le=20_000, description="Results at which a chunk of them is stored")
    chunk_bytes: int = Field(MIB, ge=1, le=64 * MIB, description="The same in bytes")
    chunk_ms: int = Field(30_000, ge=50, description="The same in time, for slow batches; sooner while they are young")
    part_bytes: int = Field(8 * MIB, ge=1, description="Least size of a part of an output file, but for the last")
    cancel_grace_ms: int = Field(
        5_000, ge=0, description="How long lines on the queue may take to finish once their batch is to end early"
    )
    retry_ms: int = Field(500, ge=10, description="Pause before a step that failed is tried again; doubled each time")
    max_retry_ms: int = Field(30_000, ge=10, description="Longest such pause")
    shutdown_limit_ms: int = Field(10_000, ge=100, description="How long the running step may take to end at the end")

    @field_validator("batcher_id")
    @classmethod
    def _name(cls, value: str) -> str:
        try:
            return check_worker_id(value)
        except BadMessage as error:
            raise ValueError(error.message) from error
