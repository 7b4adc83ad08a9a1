"""Webhook endpoints and deliveries as clients ask for them and see them (``openai.types.webhooks``).

Ours beside OpenAI's fields: ``enabled`` and ``keep_old_secret_s``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from openai_api.json_types import json_type
from queue_schemas import BadRequest
from webhooks.deliveries import Delivery
from webhooks.endpoints import Endpoint, Secrets
from webhooks.events import ALL_EVENTS, EVENT_TYPES

from ..http.json_body import RequestBody

MAX_NAME_CHARS = 200
DAY_S = 86_400
MAX_KEEP_S = 7 * DAY_S


def _check_name(name: str | None) -> str | None:
    if name is not None and not name.isprintable():
        raise ValueError("must have printable characters only")
    return name


def _check_event_types(events: object) -> object:
    """Names of events, each once. Raises ``BadRequest``."""
    if events is None:
        return None
    if not isinstance(events, list) or not events:
        what = "empty" if events == [] else json_type(events)
        raise BadRequest(f"event_types must be a list of names, not {what}", param="event_types")
    for event in events:
        if event not in EVENT_TYPES and (event != ALL_EVENTS or len(events) > 1):
            raise BadRequest(
                f"event_types: {str(event)[:80]!r} is no event type here: choose from {', '.join(EVENT_TYPES)}, or "
                f'["{ALL_EVENTS}"] for all',
                param="event_types",
            )
    return list(dict.fromkeys(events))


def _check_event_type(event: object) -> object:
    if event not in EVENT_TYPES:
        raise BadRequest(f"event_type must be one of {', '.join(EVENT_TYPES)}", param="event_type")
    return event


EventTypes = Annotated[list[str], BeforeValidator(_check_event_types)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS), AfterValidator(_check_name)]


class EndpointCreate(RequestBody):
    """The body of ``POST /v1/webhook_endpoints``."""

    url: str
    event_types: EventTypes
    name: Name | None = None


class EndpointChange(RequestBody):
    """The body of ``POST /v1/webhook_endpoints/ID``. What is null or missing stays as it is."""

    url: str | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    enabled: bool | None = None


class SecretRotation(RequestBody):
    """The body of ``POST /v1/webhook_endpoints/ID/rotate_secret``: how long the old secret stays valid."""

    keep_old_secret_s: int | None = Field(None, ge=0, le=MAX_KEEP_S)
    keep_old_secret_active_for_24_hours: bool | None = None

    @property
    def keep_s(self) -> int:
        """Seconds; 0: the old secret ends at once."""
        if self.keep_old_secret_s is not None:
            return self.keep_old_secret_s
        return DAY_S if self.keep_old_secret_active_for_24_hours else 0


class EndpointTest(RequestBody):
    """The body of ``POST /v1/webhook_endpoints/ID/test``."""

    event_type: Annotated[str, BeforeValidator(_check_event_type)]


def endpoint_object(endpoint: Endpoint, secrets: Secrets | None, *, show_secret: bool = False) -> dict[str, Any]:
    """An endpoint; its secret only with ``show_secret``, in the response that made it."""
    record, disabled = endpoint.record, endpoint.disabled
    found: dict[str, Any] = {
        "id": record.id,
        "object": "webhook_endpoint",
        "url": record.url,
        "event_types": list(record.events),
        "name": record.name,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "signing_secret_hint": secrets.hint if secrets is not None else None,
        "status": "enabled" if endpoint.active else "disabled",
        "disabled_reason": disabled.reason if disabled is not None else "by its owner" if record.paused else None,
        "disabled_at": disabled.at_ms // 1000 if disabled is not None else None,
    }
    if show_secret and secrets is not None:
        found["signing_secret"] = secrets.current
    return found


def delivery_object(delivery: Delivery) -> dict[str, Any]:
    """The attempts to deliver one event to one endpoint. Times are Unix seconds."""
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
