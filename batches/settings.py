"""Settings of the batcher. Those of the queue are :class:`broker.BrokerSettings`, of the file store
:class:`storage.StorageSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr

from telemetry import HeaderSecret, ManagerUrls, ProcessId, RequestSettings

MIB = 1024 * 1024


class BatchSettings(RequestSettings):
    """Table ``[batches]``, environment ``INFERQ_BATCHES_*``."""

    table: ClassVar[str] = "batches"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    host: str = Field("127.0.0.1", description="Address to serve health and metrics on")
    port: int = Field(7_500, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    batcher_id: ProcessId = Field("batcher", description="Name of this batcher in logs and among RQ's workers")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of Managers or Routers, asked in turn for the address of Redis unless redis_url is set",
    )
    join_token: HeaderSecret = Field(SecretStr(""), description="Join token to show to the Manager")
    scan_interval_ms: int = Field(
        1_000, ge=20, le=60_000, description="How often to look for new batches, and for those whose batcher died"
    )
    expiry_interval_ms: int = Field(
        60_000, ge=20, description="How often to remove expired files, and ended batches after keep_ended_s"
    )
    keep_ended_s: int = Field(2_592_000, ge=0, description="How long an ended batch stays in lists; 0: for ever")
    step_ms: int = Field(2_000, ge=10, le=8_000, description="Duration of one step of a batch while no other waits")
    shared_step_ms: int = Field(
        500, ge=10, le=8_000, description="Duration of a step while other batches wait; shorter the more there are"
    )
    lock_ttl_ms: int = Field(
        10_000, ge=500, le=60_000, description="After so long, the step of a batcher that died counts as ended"
    )
    max_lines: int = Field(50_000, ge=1, le=100_000_000, description="Maximum lines of a batch")
    max_line_bytes: int = Field(16 * MIB, ge=1024, le=96 * MIB, description="Maximum length of a line of an input file")
    model_wait_ms: int = Field(
        15_000, ge=0, description="How long to wait for a model that no worker has named yet before it is an error"
    )
    refuse_late: bool = Field(
        True,
        description="Fail a batch at its start that cannot end within its window even if it were alone, by the rate at "
        'which its model served requests of late; metadata {"inferq_allow_late": "true"} lets one run all the same',
    )
    window_lines: int = Field(512, ge=1, le=50_000, description="Maximum lines of one batch on the queue at a time")
    window_bytes: int = Field(8 * MIB, ge=1, description="The same in bytes; a longer line goes alone")
    max_attempts: int = Field(3, ge=1, le=100, description="Maximum attempts of a line before it fails")
    max_busy_tries: int = Field(
        10, ge=1, le=50, description="How often to send a line whose engine answers 429, 502, 503 or 504, in total"
    )
    busy_backoff_ms: int = Field(
        1_000, ge=10, le=60_000, description="First pause before it is sent again; doubled each time, up to a minute"
    )
    resend_after_ms: int = Field(
        30_000,
        ge=100,
        description="A line without an answer for so long is enqueued again: if its job still runs, nothing changes",
    )
    reply_ttl_ms: int = Field(
        3_600_000,
        ge=10_000,
        description="How long Redis keeps answers while no batcher reads them; then waiting lines are cancelled there, "
        "and sent again later",
    )
    chunk_lines: int = Field(500, ge=1, le=20_000, description="Number of results at which a chunk is stored")
    chunk_bytes: int = Field(MIB, ge=1, le=64 * MIB, description="Size of results at which a chunk is stored")
    chunk_ms: int = Field(
        30_000, ge=50, description="Time after which results are stored as a chunk; sooner in new batches"
    )
    min_part_bytes: int = Field(8 * MIB, ge=1, description="Minimum size of a part of an output file, except the last")
    cancel_grace_ms: int = Field(
        5_000, ge=0, description="How long lines on the queue may take to finish once their batch is to end early"
    )
    retry_backoff_ms: int = Field(
        500, ge=10, description="First pause before a failed step is retried; doubled each time"
    )
    max_retry_backoff_ms: int = Field(30_000, ge=10, description="Longest such pause")
    shutdown_timeout_ms: int = Field(
        10_000, ge=100, description="How long the running step may take to end at shutdown"
    )
