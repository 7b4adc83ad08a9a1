"""What webhooks may do: the same for every Router, where endpoints are made, and every notifier, which sends."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from telemetry import CommaList, RoleSettings

from .urls import UrlRules


class WebhookSettings(RoleSettings):
    """Table ``[webhooks]``, environment ``INFERQ_WEBHOOKS_*``."""

    table: ClassVar[str] = "webhooks"
    prefixed: ClassVar[bool] = True

    allow_http: bool = Field(False, description="Send webhooks to http:// URLs too: anybody on the way can read them")
    allow_private: CommaList = Field(
        default_factory=list,
        description="Hosts, addresses and networks (10.0.0.0/8) that are not on the public internet and may still get "
        "webhooks",
    )
    tenant_endpoints: int = Field(20, ge=1, le=100, description="Most webhook endpoints of one tenant")

    @field_validator("allow_private")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        UrlRules.allowing(value, allow_http=False)
        return value

    @property
    def rules(self) -> UrlRules:
        return UrlRules.allowing(self.allow_private, allow_http=self.allow_http)
