"""The notifier's settings. Where webhooks may go is in :class:`webhooks.url_settings.WebhookSettings`, RQ's Redis in
:class:`broker.BrokerSettings`, the queue's in :class:`broker.BrokerSettings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from queue_schemas import BadMessage, check_worker_id
from telemetry import HeaderSecret, ManagerUrls, RoleSettings

from .core import Limits


class NotifierSettings(RoleSettings):
    """Table ``[notifier]``, environment ``INFERQ_NOTIFIER_*``."""

    table: ClassVar[str] = "notifier"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    host: str = Field("127.0.0.1", description="Address to serve health and metrics on")
    port: int = Field(7_600, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    notifier_id: str = Field("notifier", description="Name of this notifier in logs and among RQ's workers")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of Managers or Routers, which are asked in turn where Redis is unless redis_url says so",
    )
    join_token: HeaderSecret = Field(SecretStr(""), description="Shown to the Manager")
    attempt_limit_ms: int = Field(8_000, ge=50, le=60_000, description="How long one attempt may take in all")
    scan_ms: int = Field(1_000, ge=20, le=60_000, description="How often the store is looked through for what is due")
    lock_ms: int = Field(
        10_000, ge=3_000, le=60_000, description="After so long the round of a notifier that died counts as over"
    )
    tidy_ms: int = Field(600_000, ge=100, description="How often logs of what was delivered are trimmed")
    endpoint_attempts: int = Field(4, ge=1, description="Most attempts at once for one endpoint")
    tenant_attempts: int = Field(16, ge=1, description="Most attempts at once for one tenant")
    all_attempts: int = Field(256, ge=1, description="Most attempts at once")
    endpoint_pending: int = Field(
        10_000, ge=1, description="Most deliveries that wait for one endpoint; the oldest beyond it are given up"
    )
    disable_after_days: int = Field(
        5,
        ge=0,
        description="An endpoint that has taken nothing for so long is disabled when a delivery is given up; 0: never",
    )
    keep_days: int = Field(7, ge=1, description="How long what became of a delivery is kept")
    keep_deliveries: int = Field(1_000, ge=1, description="How many deliveries of an endpoint are kept at most")

    @field_validator("notifier_id")
    @classmethod
    def _name(cls, value: str) -> str:
        try:
            return check_worker_id(value)
        except BadMessage as error:
            raise ValueError(error.message) from error

    @property
    def limits(self) -> Limits:
        return Limits(self.endpoint_attempts, self.tenant_attempts, self.all_attempts)
