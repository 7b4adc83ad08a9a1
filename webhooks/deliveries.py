"""A delivery of one event to one endpoint: its key, its attempts and its state. Pure records, for the store and the
core."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from queue_schemas import Tenant

from .events import WebhookEvent


class Outcome(StrEnum):
    """How a delivery stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class Attempt(BaseModel):
    """One HTTP attempt. ``status`` is the receiver's HTTP status; None if no answer came, and ``error`` says why."""

    model_config = ConfigDict(frozen=True)

    at_ms: int
    took_ms: int
    status: int | None = None
    error: str = ""


class DeliveryState(BaseModel):
    """How far a delivery has come.

    ``tries`` counts attempts that were begun; one that a crash cut short has no entry in ``attempts``. A pending
    delivery is not attempted before ``next_at_ms``.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Outcome = Outcome.PENDING
    tries: int = 0
    next_at_ms: int = 0
    attempts: tuple[Attempt, ...] = ()

    @property
    def settled(self) -> bool:
        return self.outcome is not Outcome.PENDING


@dataclass(frozen=True, slots=True)
class DeliveryKey:
    """Names a delivery: which event, to which endpoint."""

    tenant: Tenant
    endpoint_id: str
    event_id: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as the API lists it."""

    event: WebhookEvent
    state: DeliveryState
