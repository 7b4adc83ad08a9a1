"""The notifier's settings. Where webhooks may go is in :class:`storage.WebhookSettings`, RQ's Redis in
:class:`batches.BatchSettings`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from telemetry import RoleSettings

from .core import Limits


class NotifierSettings(RoleSettings):
    """Table ``[notifier]``, environment ``INFERQ_NOTIFIER_*``."""

    table: ClassVar[str] = "notifier"

    host: str = Field("127.0.0.1", description="Address to serve health and metrics on")
    port: int = Field(9_300, ge=0, le=65_535, description="TCP port of health and metrics; 0 takes a free one")
    attempt_limit_ms: int = Field(8_000, ge=50, le=60_000, description="How long one attempt may take in all")
    scan_ms: int = Field(1_000, ge=20, le=60_000, description="How often the store is looked through for what is due")
    tidy_ms: int = Field(600_000, ge=100, description="How often logs of what was delivered are trimmed")
    endpoint_attempts: int = Field(4, ge=1, description="Most attempts at once for one endpoint")
    tenant_attempts: int = Field(16, ge=1, description="Most attempts at once for one tenant")
    all_attempts: int = Field(256, ge=1, description="Most attempts at once")
    endpoint_pending: int = Field(
        10_000, ge=1, description="Most deliveries that wait for one endpoint; the oldest beyond it are given up"
    )
    keep_days: int = Field(7, ge=1, description="How long what became of a delivery is kept")
    keep_deliveries: int = Field(1_000, ge=1, description="How many deliveries of an endpoint are kept at most")

    @property
    def limits(self) -> Limits:
        return Limits(self.endpoint_attempts, self.tenant_attempts, self.all_attempts)
