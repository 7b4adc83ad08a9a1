"""Webhook endpoints as the vendor's API shows them (``openai.types.webhooks.WebhookEndpoint``), and deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from webhooks.deliveries import Delivery
from webhooks.endpoints import Endpoint, Secrets


def endpoint_object(endpoint: Endpoint, keys: Secrets | None, *, shown: bool = False) -> dict[str, Any]:
    """An endpoint; its secret only if it is to be ``shown``, which it is once."""
    record, disabled = endpoint.record, endpoint.disabled
    found: dict[str, Any] = {
        "id": record.id,
        "object": "webhook_endpoint",
        "url": record.url,
        "event_types": list(record.events),
        "name": record.name,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "signing_secret_hint": keys.hint if keys is not None else None,
        "status": "enabled" if endpoint.active else "disabled",
        "disabled_reason": disabled.reason if disabled is not None else "by its owner" if record.paused else None,
        "disabled_at": disabled.at_ms // 1000 if disabled is not None else None,
    }
    if shown and keys is not None:
        found["signing_secret"] = keys.current
    return found


def delivery_object(delivery: Delivery) -> dict[str, Any]:
    """What became of one event for one endpoint. Times are Unix seconds."""
    event, state = delivery.event, delivery.state
    return {
        "id": event.id,
        "object": "webhook_endpoint.delivery",
        "event_type": event.type,
        "created_at": event.created_at,
        "data": {"id": event.object_id},
        "status": state.outcome.value,
        "next_attempt_at": None if state.settled else state.next_at_ms // 1000,
        "attempts": [
            {
                "at": attempt.at_ms // 1000,
                "status_code": attempt.status,
                "duration_ms": attempt.took_ms,
                "error": attempt.error or None,
            }
            for attempt in state.attempts
        ],
    }


def list_object(data: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(data), **ends, "has_more": more}
