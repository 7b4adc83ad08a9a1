"""Settings of the Ray topology. Router, Manager and broker keep their own, the same as elsewhere."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from scheduling.autoscale import MAX_REPLICAS
from telemetry import ManagerUrls, RoleSettings
from telemetry.files import absolute_path
from worker.settings import Arguments

MIN_OBJECT_STORE_MIB = 76
"""Ray refuses less."""


class RaySettings(RoleSettings):
    """Table ``[ray]``, environment ``INFERQ_RAY_*``."""

    table: ClassVar[str] = "ray"
    repeatable: ClassVar[Mapping[str, str]] = {"advertise_urls": "advertise-url"}

    address: str = Field(
        "", description="Ray cluster to join: host:port, or auto for the one that runs here; empty: one of our own"
    )
    host: str = Field("127.0.0.1", description="Address on which clients and workers reach the Router")
    port: int = Field(8000, ge=1, le=65_535, description="TCP port on which clients and workers reach the Router")
    way_in: Literal["replica", "serve"] = Field(
        "replica", description="Who listens there: the Router's replicas themselves, or Serve's proxy before them"
    )
    min_replicas: int = Field(2, ge=1, le=1_000, description="Replicas of the Router that always run")
    max_replicas: int = Field(8, ge=1, le=1_000, description="Most replicas of the Router")
    target_open_requests: int = Field(200, ge=1, description="Open requests per replica that Serve scales towards")
    up_delay_ms: int = Field(5_000, ge=0, description="How long more replicas must have been called for")
    down_delay_ms: int = Field(120_000, ge=0, description="How long fewer replicas must have been enough")
    replica_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for each replica")
    lame_duck_ms: int = Field(
        3_000, ge=0, description="The Router's lame_duck_ms in this topology, unless that is set itself"
    )
    model: str = Field(
        "",
        description="Model whose workers Ray runs, as in `inferq worker --model`; empty: all are left as they are",
    )
    workers: int = Field(1, ge=0, le=MAX_REPLICAS, description="Workers of the model that always run")
    max_workers: int = Field(
        0,
        ge=0,
        le=MAX_REPLICAS,
        description="Most workers of the model, started and drained as its queue asks (table [autoscale]); 0: workers",
    )
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs that Ray reserves for each worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that Ray reserves for each worker")
    worker_args: Arguments = Field(
        [], description="Further options of `inferq worker`. On the command line: all that follows --"
    )
    advertise_urls: ManagerUrls = Field(
        [], description="Router URLs given to workers; empty: from host and port, and node_host if host is a wildcard"
    )
    node_host: str = Field(
        "", description="This machine's address for nodes that join our own cluster; empty: it stays on loopback"
    )
    head_port: int = Field(0, ge=0, le=65_535, description="Port of our own cluster's head; 0 takes a free one")
    dashboard_port: int = Field(
        8265, ge=0, le=65_535, description="Port of our own cluster's dashboard, on loopback; 0 takes a free one"
    )
    object_store_mib: int = Field(
        MIN_OBJECT_STORE_MIB,
        ge=MIN_OBJECT_STORE_MIB,
        description="Memory of our own cluster's object store; the fabric puts nothing there",
    )
    session_dir: str = Field(
        "", description="Folder of our own cluster's sockets and logs, a short path; empty: one below the system's"
    )
    data_dir: str = Field(".inferq", description="Folder of the record of our own cluster, its token and its log")
    start_limit_ms: int = Field(
        90_000, ge=1_000, description="How long a head, the Manager or the first replicas may take to start"
    )
    connect_limit_ms: int = Field(20_000, ge=500, description="How long a cluster may take to let us in")
    ready_limit_ms: int = Field(
        20_000, ge=0, description="How long `up` waits for the fabric to be ready before it says why it is not"
    )

    @model_validator(mode="after")
    def _in_proportion(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be more than max_replicas")
        if 0 < self.max_workers < self.workers:
            raise ValueError("max_workers must be 0, or at least workers")
        about_workers = {"workers", "max_workers", "cpus_per_worker", "gpus_per_worker", "worker_args"}
        if not self.model and about_workers & self.model_fields_set:
            raise ValueError("say what the workers serve: --model MODEL")
        return self

    @property
    def data_folder(self) -> Path:
        return absolute_path(self.data_dir)

    @property
    def session_folder(self) -> Path:
        """Short, as the sockets in it must not have a path of more than 107 bytes."""
        if self.session_dir:
            return absolute_path(self.session_dir)
        mark = hashlib.sha256(str(self.data_folder).encode()).hexdigest()[:8]
        return Path(tempfile.gettempdir()) / f"inferq-ray-{os.getuid()}" / mark
