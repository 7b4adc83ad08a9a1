"""The Router's settings. The broker's are in :class:`broker.BrokerSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from broker import Budgets, Durability
from openai_api.batch_windows import window_seconds
from openai_api.paths import known_paths
from queue_schemas import BadMessage, OnLoss, check_region
from telemetry import CommaList, HeaderSecret, ManagerUrls, RequestSettings
from telemetry.http.connections import ConnectionLimits

from .http.cors import check_origin
from .model_directory import OnNoWorker

MIB = 1024 * 1024


class RouterSettings(RequestSettings):
    """Table ``[router]``, environment ``INFERQ_ROUTER_*``."""

    table: ClassVar[str] = "router"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(18_000, ge=0, le=65_535, description="TCP port to listen on; 0 takes a free one")
    router_id: str = Field("router", description="Name of this Router in logs and on the queue's server")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of the Managers, or ray:manager within Ray: workers register through them, and they "
        "tell where Redis is",
    )
    manager_timeout_ms: int = Field(10_000, ge=50, description="Limit on one call to the Manager")
    join_token: HeaderSecret = Field(
        SecretStr(""), description="Shown to the Manager; also opens /fabric/v1 to operators"
    )
    insecure: bool = Field(False, description="Listen on a public address without API keys")
    api_keys_file: str = Field(
        "", description="File with one <sha256 of an API key>:<tenant> per line, read again when it changes"
    )
    api_keys: str = Field("", description="The same lines, separated by line ends or commas")
    pools: CommaList = Field(default_factory=list, description="Models that are known even before a worker serves them")
    extra_paths: CommaList = Field(
        default_factory=list, description="Paths passed to engines beside the inference paths that are built in"
    )
    cors_allow_origins: CommaList = Field(
        default_factory=list,
        description="Origins whose web pages may call this Router, such as https://app.example.com, or *; none: no "
        "answer says so, and browsers refuse it to pages of other origins",
    )
    responses: Literal["auto", "engine", "chat"] = Field(
        "auto",
        description="POST /v1/responses without background: passed to the engine as it is, built from a chat "
        "completion, or auto: built from one where the engine has no Responses API",
    )
    on_no_worker: OnNoWorker = Field(
        "queue", description="A request for a known model that no worker serves: queue it, or refuse it with 503"
    )
    default_deadline_ms: int = Field(
        600_000,
        ge=1,
        description="How long a request may take that does not say so (x-inferq-deadline-ms, or timeout in its body)",
    )
    max_deadline_ms: int = Field(3_600_000, ge=1, description="Longest deadline that a request may ask for")
    deadline_grace_ms: int = Field(
        5_000, ge=0, description="How long after its deadline a request waits for the queue to say so"
    )
    region: str = Field(
        "", description="Where this Router stands: workers of that region run its requests first; empty: no region"
    )
    region_remote_after_ms: int = Field(
        500, ge=0, le=600_000, description="How long a request waits for a worker of this region before any may run it"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="How often a request is started before it is given up")
    max_body_bytes: int = Field(32 * MIB, ge=1024, le=100 * MIB, description="Largest request body")
    max_inflight_body_bytes: int = Field(
        1024 * MIB, ge=1024, description="Bodies of all requests served at once, in bytes; beyond it: 429"
    )
    tenant_inflight_body_bytes: int = Field(
        0,
        ge=0,
        description="The same for one tenant; 0: three quarters of max_inflight_body_bytes, or all without API keys",
    )
    body_idle_timeout_ms: int = Field(
        30_000,
        ge=50,
        description="How long a body, of a request or an upload, may be silent; then it is refused with 408",
    )
    min_transfer_bytes_per_s: int = Field(
        1_024,
        ge=0,
        description="Least rate at which a body may arrive (over body_idle_timeout_ms) and an answer that waits be "
        "read (over client_stall_ms); slower ones are ended",
    )
    max_connections: int = Field(
        16_384,
        ge=1,
        description="Open connections; beyond it the one that has been idle for the longest is closed. Never more than "
        "the open files that the process may have, less 128",
    )
    max_concurrent: int = Field(4096, ge=1, description="Requests served at once; beyond it: 429")
    tenant_concurrent: int = Field(
        0,
        ge=0,
        description="Requests of one tenant served at once; 0: three quarters of max_concurrent, or all of it without "
        "API keys",
    )
    client_buffer_bytes: int = Field(
        4 * MIB, ge=16 * 1024, description="A client that lags behind by more is disconnected, its request cancelled"
    )
    client_stall_ms: int = Field(
        120_000,
        ge=100,
        description="A client that reads nothing of an answer that waits for it, streamed or not, is disconnected "
        "after so long, its request cancelled",
    )
    on_loss: OnLoss = Field(
        "continue",
        description="A stream whose worker is lost goes on where it stopped, is run again and compared, or fails "
        "(x-inferq-on-loss)",
    )
    replay_bytes: int = Field(
        MIB,
        ge=0,
        description="How much text of each stream is kept (beside 64 KiB) to go on after a lost worker; beyond it: "
        "stream_broken, except of a stored stream that goes on where it stopped",
    )
    keep_answers_ms: int = Field(
        86_400_000,
        ge=1,
        description="How long the answer to a request with an Idempotency-Key is kept for repeats of it",
    )
    background_deadline_ms: int = Field(
        86_400_000,
        ge=1,
        description="How long a background request may wait and run, and the longest deadline that one may ask for",
    )
    keep_jobs_ms: int = Field(
        86_400_000, ge=1, description="How long a background request is kept once it has ended, with its answer"
    )
    resumable_streams: bool = Field(
        False, description="Every stream may be resumed, not only those that ask for it (x-inferq-resumable: true)"
    )
    resume_grace_ms: int = Field(
        30_000, ge=100, description="How long a resumable stream runs on without its client before it is cancelled"
    )
    resume_keep_ms: int = Field(
        300_000, ge=1, description="How long the answer of a resumable stream is kept once it is whole"
    )
    keepalive_ms: int = Field(
        15_000, ge=50, description="A stream that is silent for so long gets a comment, so that nothing cuts it"
    )
    directory_ms: int = Field(1_000, ge=20, le=60_000, description="How often the list of models is refreshed")
    sweep_ms: int = Field(1_000, ge=10, le=5_000, description="How often deadlines, keep-alives and stalls are checked")
    lame_duck_ms: int = Field(
        0, ge=0, description="How long, at the end, it serves on while /readyz says no, for load balancers to notice"
    )
    shutdown_limit_ms: int = Field(30_000, ge=0, description="How long running requests may take to finish at the end")
    store_threads: int = Field(16, ge=1, le=256, description="How many calls to the file store run at once")
    store_timeout_ms: int = Field(
        20_000, ge=50, description="Limit on one call to the file store; a file is written and read in many"
    )
    max_file_bytes: int = Field(512 * MIB, ge=1, description="Largest file that may be uploaded")
    max_transfers: int = Field(64, ge=1, description="Uploads and downloads at once; beyond it: 429")
    tenant_transfers: int = Field(
        0,
        ge=0,
        description="The same for one tenant; 0: three quarters of max_transfers, or all without API keys",
    )
    batch_file_life_s: int = Field(
        2_592_000,
        ge=0,
        description="When a file uploaded for batches expires that does not say so itself; 0: never",
    )
    tenant_files: int = Field(10_000, ge=1, description="Most files of one tenant; beyond it uploads are refused")
    tenant_file_bytes: int = Field(
        100 * 1024 * MIB,
        ge=1,
        description="Most bytes in the file store of one tenant; beyond it uploads are refused",
    )
    durability: Durability = Field(
        "memory",
        description="When work that nobody waits for (stored, background and batch requests) is taken in: once Redis "
        "has it (memory), or once its append-only file is on the disk (disk; up to 2 s later)",
    )
    tenant_jobs: int = Field(100_000, ge=1, description="Most live jobs (waiting or running) of one tenant")
    tenant_bytes: int = Field(1024 * MIB, ge=1, description="Most bytes of live jobs of one tenant")
    tenant_persisted_bytes: int = Field(
        512 * MIB,
        ge=0,
        description="Most bytes kept of one tenant's requests (background, resumable, with an Idempotency-Key); "
        "beyond it: 429",
    )
    pool_jobs: int = Field(200_000, ge=1, description="Most live jobs of one model")
    pool_bytes: int = Field(2048 * MIB, ge=1, description="Most bytes of live jobs of one model")
    tenant_batches: int = Field(1_000, ge=1, description="Most batches of one tenant that have not ended; beyond: 429")
    batch_windows: CommaList = Field(
        default_factory=lambda: ["24h"],
        min_length=1,
        description="Completion windows that a batch may ask for, such as 24h, 30m or 7d",
    )

    @field_validator("region")
    @classmethod
    def _region_name(cls, value: str) -> str:
        try:
            return check_region(value)
        except BadMessage as error:
            raise ValueError(error.message) from error

    @field_validator("extra_paths")
    @classmethod
    def _plain_paths(cls, value: list[str]) -> list[str]:
        known_paths(value)
        return value

    @field_validator("cors_allow_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        return [check_origin(origin) for origin in value]

    @field_validator("batch_windows")
    @classmethod
    def _real_windows(cls, value: list[str]) -> list[str]:
        for window in value:
            window_seconds(window)
        return value

    @model_validator(mode="after")
    def _in_proportion(self) -> Self:
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError("default_deadline_ms must not be longer than max_deadline_ms")
        if self.max_body_bytes > self.max_inflight_body_bytes:
            raise ValueError("max_inflight_body_bytes must not be less than max_body_bytes")
        if 0 < self.tenant_inflight_body_bytes < self.max_body_bytes:
            raise ValueError("tenant_inflight_body_bytes must not be less than max_body_bytes")
        return self

    @property
    def paths(self) -> frozenset[str]:
        """Every path that reaches an engine."""
        return known_paths(self.extra_paths)

    @property
    def connection_limits(self) -> ConnectionLimits:
        """What clients may do to a Router's connections."""
        return ConnectionLimits(
            body_idle_timeout_s=self.body_idle_timeout_ms / 1000,
            write_idle_timeout_s=self.client_stall_ms / 1000,
            min_transfer_bytes_per_s=self.min_transfer_bytes_per_s,
            max_connections=self.max_connections,
            settings_prefix="INFERQ_ROUTER_",
        )

    @property
    def budgets(self) -> Budgets:
        return Budgets(
            self.tenant_jobs, self.tenant_bytes, self.pool_jobs, self.pool_bytes, self.tenant_persisted_bytes
        )
