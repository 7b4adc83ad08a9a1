"""The limits on one request as settings, the same for Routers and batchers."""

from __future__ import annotations

from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, field_validator

from openai_api.media import MediaHosts
from openai_api.request_limits import RequestLimits
from queue_schemas.job import MAX_WEIGHT, MAX_YIELDS, MIN_WEIGHT
from queue_schemas.lanes import BANDS

from .settings import CommaList, JsonTable, RoleSettings


class TenantLimits(BaseModel):
    """Limits of one tenant, in place of those of all; its share, and how urgent it may call its requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_choices: int | None = Field(default=None, ge=1)
    max_entries: int | None = Field(default=None, ge=1)
    max_logprobs: int | None = Field(default=None, ge=0)
    max_output_tokens: int | None = Field(default=None, ge=0)
    weight: float = Field(default=1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT)
    highest_band: int = Field(default=0, ge=0, lt=BANDS)


class RequestSettings(RoleSettings):
    """What one request may ask for. Each field also goes by ``INFERQ_<FIELD>``, for all roles at once."""

    media_domains: CommaList = Field(
        default_factory=list,
        description="Hosts from which engines may fetch images, audio, video and files that a request names by URL, by "
        "their exact names; empty: none, so requests bring media as data: URLs; *: any host",
    )
    max_choices: int = Field(128, ge=1, description="Most choices of one request (n, best_of)")
    max_entries: int = Field(
        2_048,
        ge=1,
        description="Most prompts, inputs, documents or stop words that one request lists, and most answers it has",
    )
    max_logprobs: int = Field(20, ge=0, description="Most log probabilities for each token (logprobs, top_logprobs)")
    max_output_tokens: int = Field(
        0, ge=0, description="Most tokens that a request may ask for (max_tokens); 0: as many as its model has"
    )
    max_yields: int = Field(
        4,
        ge=0,
        le=MAX_YIELDS,
        description="How often a background request or a line of a batch may be interrupted for interactive requests; "
        "it goes on behind what it said. 0: never",
    )
    tenant_limits: JsonTable[TenantLimits] = Field(
        default_factory=dict,
        description="Other limits for single tenants, their weights against others (1), and the most urgent band of "
        '``priority`` that they may have (0 to 3), as JSON or a table: {"acme": {"max_choices": 512, "weight": 4, '
        '"highest_band": 1}}',
    )

    @field_validator("media_domains")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        MediaHosts.of(value)
        return value

    def limits_of(self, tenant: str) -> RequestLimits:
        """The limits on a request of ``tenant``."""
        return self._by_tenant.get(tenant, self._limits)

    def weight_of(self, tenant: str) -> float:
        """The tenant's share of a model's tokens, against those of others that wait for it too."""
        own = self.tenant_limits.get(tenant)
        return 1.0 if own is None else own.weight

    def highest_band_of(self, tenant: str) -> int:
        """The most urgent band that requests of ``tenant`` may have."""
        own = self.tenant_limits.get(tenant)
        return 0 if own is None else own.highest_band

    @cached_property
    def _limits(self) -> RequestLimits:
        return self._with(TenantLimits())

    @cached_property
    def _by_tenant(self) -> dict[str, RequestLimits]:
        return {tenant: self._with(own) for tenant, own in self.tenant_limits.items()}

    def _with(self, own: TenantLimits) -> RequestLimits:
        def limit(name: str) -> int:
            value: int | None = getattr(own, name)
            return int(getattr(self, name)) if value is None else value

        return RequestLimits(
            choices=limit("max_choices"),
            entries=limit("max_entries"),
            logprobs=limit("max_logprobs"),
            tokens=limit("max_output_tokens"),
            media=MediaHosts.of(self.media_domains),
        )
