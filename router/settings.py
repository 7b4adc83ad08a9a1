"""The Router's settings. The broker's are in :class:`broker.BrokerSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from broker import Budgets, Durability
from openai_api.batch_windows import window_seconds
from openai_api.paths import known_paths
from queue_schemas import BadMessage, OnLoss, check_region
from scheduling.autoscale import MAX_REPLICAS, ScalingRules
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
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that serve the port together; limits on open requests, bodies, transfers and "
        "connections hold for each",
    )
    router_id: str = Field("router", description="Name of this Router in logs and on the queue's server")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of the Managers, or ray:manager within Ray: workers register through them, and they say "
        "where Redis is",
    )
    manager_timeout_ms: int = Field(10_000, ge=50, description="Timeout of one call to the Manager")
    join_token: HeaderSecret = Field(
        SecretStr(""), description="Sent to the Manager; callers that send it to this Router may use /fabric/v1"
    )
    insecure: bool = Field(False, description="Listen on a public address without API keys")
    api_keys_file: str = Field(
        "", description="File with one <sha256 of an API key>:<tenant> per line, read again when it changes"
    )
    api_keys: str = Field("", description="The same lines, separated by line ends or commas")
    worker_credentials_file: str = Field(
        "",
        description="TOML file of what workers over HTTP (/worker/v1) may do, by credential; read again if it changes",
    )
    max_worker_answer_bytes: int = Field(
        128 * MIB, ge=1024, description="Most bytes of one answer that a worker over HTTP may send"
    )
    pools: CommaList = Field(default_factory=list, description="Models that exist even before a worker serves them")
    extra_paths: CommaList = Field(
        default_factory=list, description="Paths passed to engines beside the built-in inference paths"
    )
    cors_allow_origins: CommaList = Field(
        default_factory=list,
        description="Origins whose web pages may call this Router (CORS), such as https://app.example.com, or *; none: "
        "browsers refuse pages of other origins",
    )
    responses: Literal["auto", "engine", "chat"] = Field(
        "auto",
        description="POST /v1/responses without background: engine passes it on, chat builds it from a chat "
        "completion, auto builds it where the engine has no Responses API",
    )
    on_no_worker: OnNoWorker = Field(
        "queue", description="A request for a known model that no worker serves: queue it, or refuse it with 503"
    )
    autoscale_min: int = Field(0, ge=0, le=MAX_REPLICAS, description="Least workers of a model in replicas_wanted")
    autoscale_max: int = Field(100, ge=1, le=MAX_REPLICAS, description="Most workers of a model in replicas_wanted")
    autoscale_target_wait_ms: int = Field(
        2_000,
        ge=0,
        description="Wait of an interactive request that replicas_wanted in /fabric/v1/pools, which KEDA and HPA read, "
        "aims at",
    )
    autoscale_background_wait_ms: int = Field(
        600_000, ge=0, description="The same for background jobs and lines of batches"
    )
    autoscale_worker_slots: int = Field(
        32, ge=1, le=65_536, description="Slots that replicas_wanted counts for a worker while a model has none"
    )
    default_deadline_ms: int = Field(
        600_000,
        ge=1,
        description="Deadline of a request that names none (x-inferq-deadline-ms, or timeout in its body)",
    )
    max_deadline_ms: int = Field(3_600_000, ge=1, description="Longest deadline that a request may ask for")
    admission: Literal["off", "on"] = Field(
        "off",
        description="on: a request that, by prediction, would not be started before its deadline is refused at once "
        "with 429, with Retry-After and the predicted wait",
    )
    admission_margin: float = Field(
        0.25,
        ge=0,
        le=0.9,
        description="By what part a predicted wait may be too long: a request is refused only if it would miss its "
        "deadline even then",
    )
    deadline_grace_ms: int = Field(
        5_000, ge=0, description="How long after its deadline a request waits for the queue to end it"
    )
    region: str = Field("", description="Region of this Router, whose workers run its requests first; empty: no region")
    region_remote_after_ms: int = Field(
        500,
        ge=0,
        le=600_000,
        description="How long a request waits for a worker of this region before workers of others may run it",
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Attempts of a request before it becomes a dead letter")
    max_body_bytes: int = Field(32 * MIB, ge=1024, le=100 * MIB, description="Largest request body")
    max_inflight_body_bytes: int = Field(
        1024 * MIB, ge=1024, description="Bytes of the bodies of all open requests; beyond it: 429"
    )
    max_tenant_inflight_body_bytes: int = Field(
        0,
        ge=0,
        description="The same for one tenant; 0: three quarters of max_inflight_body_bytes, or all of it without API "
        "keys",
    )
    body_idle_timeout_ms: int = Field(
        30_000,
        ge=50,
        description="How long the body of a request or upload may stall; then 408",
    )
    min_transfer_bytes_per_s: int = Field(
        1_024,
        ge=0,
        description="Lowest rate at which a body may arrive (over body_idle_timeout_ms) and a client read a response "
        "(over client_stall_timeout_ms); slower ones are ended",
    )
    max_connections: int = Field(
        16_384,
        ge=1,
        description="Open connections; beyond it the one that has been idle the longest is closed. Never more than the "
        "process's limit on open files, less 128",
    )
    max_concurrent_requests: int = Field(4096, ge=1, description="Open requests; beyond it: 429")
    max_tenant_concurrent_requests: int = Field(
        0,
        ge=0,
        description="Open requests of one tenant; 0: three quarters of max_concurrent_requests, or all of it without "
        "API keys",
    )
    max_client_buffer_bytes: int = Field(
        4 * MIB,
        ge=16 * 1024,
        description="A client that lags behind its stream by more is disconnected and its request cancelled",
    )
    client_stall_timeout_ms: int = Field(
        120_000,
        ge=100,
        description="A client that reads nothing of a response for so long, streamed or not, is disconnected and its "
        "request cancelled",
    )
    on_loss: OnLoss = Field(
        "continue",
        description="What a stream does whose worker is lost: continue where it stopped, restart and be compared, or "
        "fail (x-inferq-on-loss)",
    )
    max_replay_bytes: int = Field(
        MIB,
        ge=0,
        description="Text of each stream kept in memory (beside 64 KiB) to continue after a lost worker; beyond it: "
        "stream_broken, except for persisted jobs, which continue where they stopped",
    )
    idempotency_retention_ms: int = Field(
        86_400_000,
        ge=1,
        description="How long the response to a request with an Idempotency-Key is kept for its repetitions",
    )
    background_deadline_ms: int = Field(
        86_400_000,
        ge=1,
        description="Default and longest deadline of a background job",
    )
    background_retention_ms: int = Field(
        86_400_000, ge=1, description="How long a background job and its response are kept once it has ended"
    )
    affinity: bool = Field(
        True,
        description="Send requests to workers that hold their prefix (system prompt, conversation, X-Session-Id) in "
        "their engine's cache, where these are not loaded much more than others",
    )
    resumable_streams: bool = Field(
        False, description="Make every stream resumable, not only those that ask for it (x-inferq-resumable: true)"
    )
    resume_grace_ms: int = Field(
        30_000, ge=100, description="How long a resumable stream runs on without its client before it is cancelled"
    )
    resumable_retention_ms: int = Field(
        300_000, ge=1, description="How long the response of a resumable stream is kept once it is complete"
    )
    keepalive_interval_ms: int = Field(
        15_000, ge=50, description="A stream that is silent for so long gets a comment, so that no proxy closes it"
    )
    directory_interval_ms: int = Field(
        1_000, ge=20, le=60_000, description="How often the model directory is refreshed"
    )
    sweep_interval_ms: int = Field(
        1_000, ge=10, le=5_000, description="How often deadlines, keep-alives and stalls are checked"
    )
    lame_duck_ms: int = Field(
        0, ge=0, description="At shutdown, how long it serves on while /readyz fails, for load balancers to notice"
    )
    shutdown_timeout_ms: int = Field(30_000, ge=0, description="At shutdown, how long open requests may take to finish")
    store_threads: int = Field(16, ge=1, le=256, description="Concurrent calls to the file store")
    store_timeout_ms: int = Field(
        20_000, ge=50, description="Timeout of one call to the file store; a file is written and read in many"
    )
    max_file_bytes: int = Field(512 * MIB, ge=1, description="Largest file that may be uploaded")
    max_concurrent_transfers: int = Field(64, ge=1, description="Concurrent uploads and downloads; beyond it: 429")
    max_tenant_concurrent_transfers: int = Field(
        0,
        ge=0,
        description="The same for one tenant; 0: three quarters of max_concurrent_transfers, or all of it without API "
        "keys",
    )
    batch_file_expiry_s: int = Field(
        2_592_000,
        ge=0,
        description="When a file uploaded for batches expires, unless its upload says; 0: never",
    )
    max_tenant_files: int = Field(10_000, ge=1, description="Files of one tenant; beyond it uploads are refused")
    max_tenant_file_bytes: int = Field(
        100 * 1024 * MIB,
        ge=1,
        description="Bytes of one tenant in the file store; beyond it uploads are refused",
    )
    durability: Durability = Field(
        "memory",
        description="When persisted jobs (background, with an Idempotency-Key, of batches) count as accepted: once "
        "Redis has them (memory), or once its append-only file is on the disk (disk; up to 2 s later)",
    )
    max_tenant_jobs: int = Field(
        100_000, ge=1, description="Live jobs (waiting or running) of one tenant; beyond it: 429"
    )
    max_tenant_job_bytes: int = Field(1024 * MIB, ge=1, description="Bytes of live jobs of one tenant; beyond it: 429")
    max_tenant_persisted_bytes: int = Field(
        512 * MIB,
        ge=0,
        description="Bytes of one tenant's persisted jobs (background, resumable, with an Idempotency-Key); beyond it: "
        "429",
    )
    max_pool_jobs: int = Field(200_000, ge=1, description="Live jobs of one model; beyond it: 429")
    max_pool_job_bytes: int = Field(2048 * MIB, ge=1, description="Bytes of live jobs of one model; beyond it: 429")
    max_tenant_batches: int = Field(
        1_000, ge=1, description="Batches of one tenant that have not ended; beyond it: 429"
    )
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
        if self.autoscale_min > self.autoscale_max:
            raise ValueError("autoscale_min must not be more than autoscale_max")
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError("default_deadline_ms must not be longer than max_deadline_ms")
        if self.max_body_bytes > self.max_inflight_body_bytes:
            raise ValueError("max_inflight_body_bytes must not be less than max_body_bytes")
        if 0 < self.max_tenant_inflight_body_bytes < self.max_body_bytes:
            raise ValueError("max_tenant_inflight_body_bytes must not be less than max_body_bytes")
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
            write_idle_timeout_s=self.client_stall_timeout_ms / 1000,
            min_transfer_bytes_per_s=self.min_transfer_bytes_per_s,
            max_connections=self.max_connections,
            settings_prefix="INFERQ_ROUTER_",
        )

    @property
    def scaling_rules(self) -> ScalingRules:
        """What the workers that a queue calls for are counted by."""
        return ScalingRules(
            min=self.autoscale_min,
            max=self.autoscale_max,
            target_wait_ms=self.autoscale_target_wait_ms,
            background_wait_ms=self.autoscale_background_wait_ms,
            worker_slots=self.autoscale_worker_slots,
        )

    @property
    def budgets(self) -> Budgets:
        return Budgets(
            self.max_tenant_jobs,
            self.max_tenant_job_bytes,
            self.max_pool_jobs,
            self.max_pool_job_bytes,
            self.max_tenant_persisted_bytes,
        )
