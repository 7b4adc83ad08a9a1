"""What webhooks tell: the events, and how one is written down. Pure, but for the random id of a test.

The names and the shape are the vendor's; the bytes of :meth:`WebhookEvent.body` are what is signed and sent.
"""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import BaseModel, ConfigDict

from queue_schemas import Tenant
from storage.names import EVENT, new_id

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
    """Something has ended. ``object_id`` says what, ``created_at`` (Unix seconds) when. ``once``: it is sent once, and
    not again if that fails."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    type: str
    created_at: int
    object_id: str
    once: bool = False

    @classmethod
    def of(cls, tenant: Tenant, event_type: str, object_id: str, ended_at_s: int) -> Self:
        """The event of that end. However often it is made, it is the same one, by its id too."""
        what = f"{tenant}\n{event_type}\n{object_id}\n{ended_at_s}"
        event_id = f"{EVENT}{ended_at_s * 1000:012x}{hashlib.sha256(what.encode()).hexdigest()[:20]}"
        return cls(id=event_id, tenant=tenant, type=event_type, created_at=ended_at_s, object_id=object_id)

    @classmethod
    def sample(cls, tenant: Tenant, event_type: str, now_ms: int) -> Self:
        """An event of nothing that ended, to try an endpoint with."""
        kind = "batch_" if event_type.startswith("batch.") else "resp_"
        at_s = now_ms // 1000
        event_id, sample = new_id(EVENT, now_ms), f"{kind}test"
        return cls(id=event_id, tenant=tenant, type=event_type, created_at=at_s, object_id=sample, once=True)

    def body(self) -> bytes:
        """What is sent, byte for byte the same at every attempt."""
        told = {
            "id": self.id,
            "object": "event",
            "type": self.type,
            "created_at": self.created_at,
            "data": {"id": self.object_id},
        }
        return json.dumps(told, separators=(",", ":")).encode()
