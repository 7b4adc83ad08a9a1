"""The worker's settings, from table ``[worker]``, environment ``INFERQ_WORKER_*`` and flags."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from queue_schemas import BadMessage, check_region, check_worker_id
from queue_schemas.fleet.adapters import MAX_ADAPTER_ROOM
from queue_schemas.fleet.messages import MAX_LOADABLE, check_worker_url
from queue_schemas.ids import check_name
from telemetry import CommaList, HeaderSecret, ManagerUrls, RoleSettings

EngineKind = Literal["vllm", "url", "sim", "sim-process"]
EngineDialect = Literal["auto", "vllm", "sglang", "llamacpp", "tgi", "ollama", "openai"]

_MAX_BYTES = 96 << 20
"""What one message may carry, with room for its envelope below the wire format's 128 MiB."""


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


Arguments = Annotated[list[str], NoDecode, BeforeValidator(_words)]
"""Arguments for another program: written as in a shell, or as an array in the file."""


class WorkerSettings(RoleSettings):
    """One worker: its name, its Manager, its engine, and its limits."""

    table: ClassVar[str] = "worker"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    worker_id: str = Field("", description="name of this worker, unique in the fleet; empty: made from the host's name")
    manager_urls: ManagerUrls = Field(
        ["http://127.0.0.1:18000"], description="Routers or Managers to register with; if one fails, the next is tried"
    )
    host: str = Field("127.0.0.1", description="address on which the worker's own HTTP service listens")
    port: int = Field(7000, ge=0, le=65_535, description="port of the worker's own HTTP service; 0: a free one")
    advertise_url: str = Field(
        "", description="URL at which the Manager reaches that service; empty: from host and port"
    )
    redis_url: str = Field("", description="URL of the queue's Redis; empty: as the Manager says")
    join_token: HeaderSecret = Field(
        SecretStr(""), description="the fleet's secret, sent to the Manager and required of callers of the worker"
    )
    key: HeaderSecret = Field(
        SecretStr(""),
        description="this worker's own credential at Routers (their worker_credentials_file), for a worker over HTTP: "
        "it needs neither the join token nor Redis",
    )
    transport: Literal["auto", "redis", "http"] = Field(
        "auto",
        description="how the queue is reached: at its Redis, or over HTTP through the Routers of manager_urls; auto: "
        "HTTP with a key of its own, else Redis",
    )
    tls_ca_file: str = Field("", description="certificates to check https:// Routers by; empty: the system's")
    tls_cert_file: str = Field("", description="client certificate to show them (mutual TLS)")
    tls_key_file: str = Field("", description="its private key, unless it is in the same file")
    insecure: bool = Field(False, description="listen on a public address without a join token")
    region: str = Field(
        "", description="region of this worker, whose jobs it runs before those of other regions; empty: no region"
    )

    engine: Literal["auto"] | EngineKind = Field(
        "auto",
        description="vllm, url, sim (in this process), sim-process (in its own), or auto: url if given, else vllm",
    )
    engine_url: str = Field("", description="base URL of an OpenAI-compatible server that runs already")
    engine_dialect: EngineDialect = Field(
        "auto",
        description="what that server is, where it differs from others: openai is any server, of which vLLM's pages "
        "are tried; auto: what its own pages say for certain, else openai",
    )
    engine_api_key: HeaderSecret = Field(SecretStr(""), description="bearer token for that server")
    model: str = Field("", description="model id or folder that vLLM serves; with sim, the simulated models' names")
    installed_models: CommaList = Field(
        [],
        description="further models that the engine (vllm or sim-process) could serve instead of model, which the "
        "Manager decides by demand: NAME, or NAME=MODEL for vLLM; it starts with model",
    )
    adapters_dir: str = Field(
        "",
        description="folder of LoRA adapters of model, one a sub-folder, by whose name clients call it; the engine "
        "loads and unloads them by demand while it serves, as the Manager decides; empty: none",
    )
    max_adapters: int = Field(
        8, ge=1, le=MAX_ADAPTER_ROOM, description="adapters that the engine holds at a time (vLLM: --max-loras)"
    )
    served_model_name: str = Field("", description="name under which vLLM serves the model; empty: the model itself")
    sim_args: Arguments = Field([], description="options of the simulated engine, as on its own command line")
    vllm_command: str = Field("", description="the vllm executable; empty: from PATH or .inferq/vllm/bin/vllm")
    vllm_args: Arguments = Field([], description="further arguments of `vllm serve`")
    media_domains: CommaList = Field(
        [],
        description="hosts from which vLLM may fetch media that requests name by URL; empty: none; *: any "
        "(the same list as the Router's)",
    )
    vllm_device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: cpu if no accelerator is seen")
    engine_ready_timeout_ms: int = Field(
        1_800_000, ge=1_000, description="an engine that takes longer to get ready (downloads included) is restarted"
    )
    engine_stop_timeout_ms: int = Field(10_000, ge=100, description="time from SIGTERM to SIGKILL of the engine")
    engine_stall_timeout_ms: int = Field(
        120_000, ge=1_000, description="an engine that produces nothing for this long while it has jobs loses them"
    )
    stream_idle_timeout_ms: int = Field(
        120_000,
        ge=1_000,
        description="a stream of plain text that stands still for this long while its engine's others go on is stopped",
    )
    buffered_stream_timeout_ms: int = Field(
        1_800_000,
        ge=1_000,
        description="the same for streams whose engine may buffer output: with tools, a response format or reasoning, "
        "of other APIs, and before the first token; the request's deadline may end them earlier",
    )
    engine_stable_after_ms: int = Field(
        10_000,
        ge=0,
        description="an engine that crashes after it was ready for this long is restarted within a second; if it "
        "crashes sooner, the pause doubles, up to a minute",
    )
    loop_stall_timeout_ms: int = Field(
        60_000, ge=1_000, description="a worker whose event loop stands still for this long loses its jobs"
    )
    engine_log_dir: Path = Field(Path(".inferq/logs"), description="folder for the engine's output")

    slots: int = Field(
        32,
        ge=1,
        le=65_536,
        description="jobs that run at once; fewer while the engine's metrics show that requests wait inside it",
    )
    max_slots: int = Field(
        0,
        ge=0,
        le=65_536,
        description="most jobs that run at once when the engine's metrics show room for more than slots; 0: slots",
    )
    engine_load_interval_ms: int = Field(
        1_000,
        ge=0,
        le=60_000,
        description="how often the load in a busy engine's metrics is read to adapt the slots; 0: never",
    )
    preemption: bool = Field(
        True,
        description="stop batch lines and background requests for interactive ones that wait, if they may yield "
        "(max_yields of Routers and batchers): they go on later behind what they said",
    )
    preemption_share: float = Field(
        0.5, gt=0, le=1, description="part of the slots that may be taken so within one second; one at least"
    )
    preemption_min_gain_ms: int = Field(
        20,
        ge=0,
        description="nothing is stopped where a slot is expected to become free within this time, from how long "
        "requests run here",
    )
    max_answer_bytes: int = Field(64 << 20, ge=1, le=_MAX_BYTES, description="largest answer of an engine, in bytes")
    flush_interval_ms: float = Field(
        4.0,
        ge=0,
        le=1_000,
        description="longest time that tokens wait so that several streams are read and sent together; 0: none",
    )
    frame_buffer_bytes: int = Field(
        64 << 20, ge=1, le=_MAX_BYTES, description="bytes of unsent frames at which reading from engines pauses"
    )
    drain_timeout_ms: int = Field(
        30_000, ge=0, description="how long running jobs may take to finish when the worker drains"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kind = self.engine_kind
        if kind == "url" and not self.engine_url.startswith(("http://", "https://")):
            raise ValueError("--engine-url must be the http:// or https:// address of an OpenAI-compatible server")
        if 0 < self.max_slots < self.slots:
            raise ValueError("--max-slots must be 0 or at least --slots")
        if kind == "vllm" and not self.model:
            raise ValueError("say what to serve: --model MODEL (vLLM), --engine-url URL, or --engine sim")
        if not self.manager_urls:
            raise ValueError("give at least one --manager-url")
        if self.transport == "redis" and self.key.get_secret_value():
            raise ValueError("a worker's --key is for --transport http; beside Redis it needs the join token")
        if self.over_http and self.redis_url:
            raise ValueError("give --redis-url, or --transport http (or a --key), not both")
        if ray := [url for url in self.manager_urls if url.startswith("ray:")]:
            raise ValueError(f"--manager-url {ray[0]}: workers do not use Ray; give the Router's http:// address")
        try:
            self._check_installed()
            check_region(self.region)
            if self.advertise_url:
                check_worker_url(self.advertise_url)
            if self.worker_id:
                check_worker_id(self.worker_id)
        except BadMessage as error:
            raise ValueError(error.message) from error
        return self

    def _check_installed(self) -> None:
        if not self.installed_models:
            return
        if self.engine_kind not in ("vllm", "sim-process"):
            raise ValueError("--installed-models are for the engines that a worker starts itself: vllm, sim-process")
        if not self.model or "," in self.model:
            raise ValueError("with --installed-models, --model names the one model to start with")
        if len(self.installed) > MAX_LOADABLE:
            raise ValueError(f"--installed-models: at most {MAX_LOADABLE} models")
        for name in self.installed:
            check_name(name, "model")

    @property
    def installed(self) -> Mapping[str, str]:
        """What the engine could serve: model ids or folders by the names that clients use; first ``model``."""
        own = (self.engine_kind == "vllm" and self.served_model_name) or self.model
        others = (entry.partition("=") for entry in self.installed_models)
        return {own: self.model} | {name: model or name for name, _, model in others if name != own}

    @property
    def own_models(self) -> frozenset[str]:
        """The names of its engine's models, as far as they are known before it runs: no adapter may have one."""
        if self.engine_kind in ("vllm", "sim-process"):
            return frozenset(self.installed)
        return frozenset(name.strip() for name in self.model.split(","))

    @property
    def engine_kind(self) -> EngineKind:
        """The engine meant by ``engine`` and ``engine_url``."""
        if self.engine != "auto":
            return self.engine
        return "url" if self.engine_url else "vllm"

    @property
    def over_http(self) -> bool:
        """Whether the queue is reached through Routers."""
        return self.transport == "http" or (self.transport == "auto" and bool(self.key.get_secret_value()))

    @property
    def name(self) -> str:
        """The worker id in force."""
        return self.worker_id or re.sub(r"[^A-Za-z0-9_.-]+", "-", socket.gethostname()).strip("-._")[:63] or "worker"
