"""Settings of the autoscaler, from table ``[autoscale]``, environment ``INFERQ_AUTOSCALE_*`` and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from queue_schemas import BadMessage
from queue_schemas.ids import check_name
from scheduling.autoscale import MAX_REPLICAS, ScalingRules
from telemetry import CommaList, HeaderSecret, ManagerUrls, ProcessId, RoleSettings
from worker.settings import Arguments

DriverName = Literal["process", "command", "ray", "kubernetes"]
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*(ms|s|m|h)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
MAX_ADAPTERS = 256
"""Each is asked for at every look."""
_TARGET = re.compile(r"(deployment|statefulset)/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def _milliseconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        raise ValueError("write a number and ms, s, m or h, as in 2s")
    return round(float(found[1]) * _UNIT_MS[found[2]])


Duration = Annotated[int, BeforeValidator(_milliseconds)]
"""Milliseconds, written ``500ms``, ``2s``, ``5m`` or ``1h``."""


class AutoscaleSettings(RoleSettings):
    """One pool, its bounds, and the driver that starts its workers."""

    table: ClassVar[str] = "autoscale"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    pool: str = Field("", description="Model whose workers are started and drained, as clients name it")
    adapters: CommaList = Field(
        [],
        max_length=MAX_ADAPTERS,
        description="LoRA adapters of the model, as clients name them: their jobs count like its own, for the same "
        "workers serve them",
    )
    min: int = Field(0, ge=0, le=MAX_REPLICAS, description="Workers that always run")
    max: int = Field(1, ge=1, le=MAX_REPLICAS, description="Most workers, those included that are draining")
    target_wait: Duration = Field(
        2_000, ge=0, description="How long an interactive request should wait at most (500ms, 2s, 1m)"
    )
    background_wait: Duration = Field(
        600_000, ge=0, description="The same for background jobs and lines of batches, without a nearer deadline"
    )
    worker_slots: int = Field(
        32, ge=1, le=65_536, description="Slots counted for a worker while none is there to tell how many it has"
    )
    scale_in_after: Duration = Field(
        60_000,
        ge=0,
        description="How long fewer workers must have been enough before one is drained; longer where starting one "
        "takes longer",
    )
    driver: DriverName = Field("process", description="What starts and ends workers")
    args: Arguments = Field(
        [],
        description="With process and ray, options of each worker; with command, the program and its arguments. On the "
        "command line: all that follows --",
    )
    manager_urls: ManagerUrls = Field(
        ["http://127.0.0.1:18000"], description="Routers or Managers to ask; if one fails, the next is asked"
    )
    join_token: HeaderSecret = Field(SecretStr(""), description="The fleet's secret, sent to them and given to workers")
    host: str = Field("127.0.0.1", description="Address to serve health and metrics on")
    port: int = Field(7_700, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    autoscaler_id: ProcessId = Field("autoscaler", description="Name of this autoscaler in logs and claims")
    interval_ms: int = Field(1_000, ge=20, le=60_000, description="How often to look at the queue")
    start_timeout: Duration = Field(
        1_800_000, ge=1, description="A worker that takes no work for so long is ended and replaced"
    )
    stop_timeout: Duration = Field(
        120_000, ge=1, description="How long a worker may take to end once it was told to; then process kills it"
    )
    driver_timeout: Duration = Field(30_000, ge=1, description="How long the driver may take for one step")
    drain_on_exit: bool = Field(
        False, description="At its own end, drain all workers that it runs; otherwise they go on, and the next one "
        "adopts them"
    )  # fmt: skip
    kubernetes_target: str = Field("", description="What is scaled: deployment/NAME or statefulset/NAME")
    kubernetes_namespace: str = Field("", description="Its namespace; empty: that of the service account")
    kubernetes_api_url: str = Field("", description="URL of the API server; empty: that of the cluster we run in")
    kubernetes_account_dir: str = Field(
        SERVICE_ACCOUNT, description="Folder with token, ca.crt and namespace of the service account"
    )
    ray_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves for each worker")
    ray_gpus: float = Field(0.0, ge=0, description="GPUs that Ray reserves for each worker")
    data_dir: str = Field(".inferq", description="Folder of the record and the logs of the workers that process starts")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not be more than max")
        if not self.manager_urls:
            raise ValueError("give at least one --manager-url")
        if ray := [url for url in self.manager_urls if url.startswith("ray:")]:
            raise ValueError(f"--manager-url {ray[0]}: give the Router's http:// address")
        if self.driver == "kubernetes" and not _TARGET.fullmatch(self.kubernetes_target):
            raise ValueError("--kubernetes-target must be deployment/NAME or statefulset/NAME")
        if self.driver == "command" and not self.args:
            raise ValueError("say what to run: inferq autoscale ... --driver command -- PROGRAM ARGUMENTS")
        try:
            for name in self.pools:
                check_name(name, "model")
        except BadMessage as error:
            raise ValueError(error.message) from error
        if len(set(self.pools)) < len(self.pools):
            raise ValueError("name each adapter once, and not the model among them")
        return self

    @property
    def pools(self) -> list[str]:
        """Whose jobs the workers serve: the model, and its adapters."""
        return [self.pool, *self.adapters] if self.pool else self.adapters

    @property
    def rules(self) -> ScalingRules:
        """The bounds and waits."""
        return ScalingRules(
            min=self.min,
            max=self.max,
            target_wait_ms=self.target_wait,
            background_wait_ms=self.background_wait,
            worker_slots=self.worker_slots,
            scale_in_after_ms=self.scale_in_after,
        )

    @property
    def claim_ttl_ms(self) -> int:
        """How long a claim of the pool lasts: several looks."""
        return max(10_000, 5 * self.interval_ms)
