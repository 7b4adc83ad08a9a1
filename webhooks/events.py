"""Webhook events: their types, ids and JSON bodies. Pure, except for the random id of a test event.

Types and shape are those of OpenAI's webhooks; the bytes of :meth:`WebhookEvent.body` are signed and sent.
"""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import BaseModel, ConfigDict

from queue_schemas import Tenant
from storage.names import new_id

EVENT = "evt_"
"""Prefix of event ids."""
EVENT_TYPES = (
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
)
ALL_EVENTS = "*"


class WebhookEvent(BaseModel):
    """A batch or response (``object_id``) ended at ``created_at`` (Unix seconds). ``once``: a failed attempt is not
    repeated."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    type: str
    created_at: int
    object_id: str
    once: bool = False

    @classmethod
    def of(cls, tenant: Tenant, event_type: str, object_id: str, ended_at_s: int) -> Self:
        """The event for that end. Deterministic, id included, so that emitting it twice delivers one event."""
        what = f"{tenant}\n{event_type}\n{object_id}\n{ended_at_s}"
        event_id = f"{EVENT}{ended_at_s * 1000:012x}{hashlib.sha256(what.encode()).hexdigest()[:20]}"
        return cls(id=event_id, tenant=tenant, type=event_type, created_at=ended_at_s, object_id=object_id)

    @classmethod
    def sample(cls, tenant: Tenant, event_type: str, now_ms: int) -> Self:
        """A sample event with which its owner tests an endpoint."""
        kind = "batch_" if event_type.startswith("batch.") else "resp_"
        at_s = now_ms // 1000
        event_id, sample = new_id(EVENT, now_ms), f"{kind}test"
        return cls(id=event_id, tenant=tenant, type=event_type, created_at=at_s, object_id=sample, once=True)

    def body(self) -> bytes:
        """The request body, byte for byte the same at every attempt."""
        message = {
            "id": self.id,
            "object": "event",
            "type": self.type,
            "created_at": self.created_at,
            "data": {"id": self.object_id},
        }
        return json.dumps(message, separators=(",", ":")).encode()
