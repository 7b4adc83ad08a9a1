"""Settings of webhooks: :class:`WebhookSettings` of Routers and notifiers, :class:`NotifierSettings` of notifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from telemetry import CommaList, HeaderSecret, ManagerUrls, ProcessId, RoleSettings

from .core import Limits
from .core.url_rules import UrlRules


class WebhookSettings(RoleSettings):
    """Table ``[webhooks]``, environment ``INFERQ_WEBHOOKS_*``. Give Routers and notifiers the same."""

    table: ClassVar[str] = "webhooks"
    prefixed: ClassVar[bool] = True

    allow_http: bool = Field(False, description="Allow http:// URLs: anyone on the way can read what is sent to them")
    allow_private: CommaList = Field(
        default_factory=list,
        description="Hosts, addresses and networks (10.0.0.0/8) that may receive webhooks although they are not on the "
        "public internet",
    )
    max_tenant_endpoints: int = Field(20, ge=1, le=100, description="Maximum webhook endpoints of one tenant")

    @field_validator("allow_private")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        UrlRules.allowing(value, allow_http=False)
        return value

    @property
    def rules(self) -> UrlRules:
        return UrlRules.allowing(self.allow_private, allow_http=self.allow_http)


class NotifierSettings(RoleSettings):
    """Table ``[notifier]``, environment ``INFERQ_NOTIFIER_*``."""

    table: ClassVar[str] = "notifier"
    repeatable: ClassVar[Mapping[str, str]] = {"manager_urls": "manager-url"}

    host: str = Field("127.0.0.1", description="Address to serve health and metrics on")
    port: int = Field(7_600, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    notifier_id: ProcessId = Field("notifier", description="Name of this notifier in logs and among RQ's workers")
    manager_urls: ManagerUrls = Field(
        default_factory=list,
        description="Base URLs of Managers or Routers, asked in turn for the address of Redis unless redis_url is set",
    )
    join_token: HeaderSecret = Field(SecretStr(""), description="Join token to show to the Manager")
    attempt_timeout_ms: int = Field(8_000, ge=50, le=60_000, description="Maximum duration of one attempt")
    scan_interval_ms: int = Field(1_000, ge=20, le=60_000, description="How often to scan the store for due deliveries")
    lock_ttl_ms: int = Field(
        10_000,
        ge=3_000,
        le=60_000,
        description="After so long, the delivery job of a notifier that died counts as ended",
    )
    tidy_interval_ms: int = Field(600_000, ge=100, description="How often to trim the logs of deliveries")
    endpoint_concurrency: int = Field(4, ge=1, description="Maximum concurrent attempts for one endpoint")
    tenant_concurrency: int = Field(16, ge=1, description="Maximum concurrent attempts for one tenant")
    concurrency: int = Field(256, ge=1, description="Maximum concurrent attempts")
    max_endpoint_pending: int = Field(
        10_000, ge=1, description="Maximum pending deliveries of one endpoint; the oldest beyond it are given up"
    )
    disable_after_days: int = Field(
        5,
        ge=0,
        description="Disable an endpoint when a delivery is given up after every attempt failed for so long; 0: never",
    )
    keep_days: int = Field(7, ge=1, description="How long to keep the log of a settled delivery")
    keep_deliveries: int = Field(1_000, ge=1, description="Maximum deliveries of an endpoint to keep in its log")

    @property
    def limits(self) -> Limits:
        return Limits(self.endpoint_concurrency, self.tenant_concurrency, self.concurrency)
