"""What may be asked about webhook endpoints: bodies read, with a sentence for everything that is wrong with them.

Fields are those of the vendor's API (``/webhook_endpoints``, 2026-08), and ours: ``enabled``, and
``keep_old_secret_s``. A field that is not known is refused: what is asked for must not be dropped unseen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from queue_schemas import BadRequest
from webhooks.core.url_rules import UrlRules, check_url
from webhooks.events import ALL_EVENTS, EVENT_TYPES

from ..http.rules import json_type, read_object

NAME_CHARS = 200
KEEP_S = 86_400
MAX_KEEP_S = 7 * 86_400

_ENDPOINT = ("url", "event_types", "name")
_KEEP, _KEEP_DAY = "keep_old_secret_s", "keep_old_secret_active_for_24_hours"


@dataclass(frozen=True, slots=True)
class EndpointParams:
    """What is asked of an endpoint; None: it stays as it is."""

    url: str | None = None
    events: tuple[str, ...] | None = None
    name: str | None = None
    enabled: bool | None = None


def read_new_endpoint(body: bytes, rules: UrlRules) -> EndpointParams:
    """Of an endpoint that is made. Raises ``BadRequest``, which names the field at fault."""
    asked = _read(body, _ENDPOINT)
    for name in ("url", "event_types"):
        if asked.get(name) is None:
            raise BadRequest(f"{name} is missing", param=name)
    return EndpointParams(_url(asked, rules), _events(asked), _name(asked) or "", None)


def read_endpoint_change(body: bytes, rules: UrlRules) -> EndpointParams:
    """Of one that is changed. Raises ``BadRequest``."""
    asked = _read(body, (*_ENDPOINT, "enabled"))
    enabled = asked.get("enabled")
    if enabled is not None and not isinstance(enabled, bool):
        raise BadRequest(f"enabled must be true or false, not {json_type(enabled)}", param="enabled")
    return EndpointParams(_url(asked, rules), _events(asked), _name(asked), enabled)


def read_rotation(body: bytes) -> int:
    """For how many seconds the old secret is to sign too. Raises ``BadRequest``."""
    asked = _read(body or b"{}", (_KEEP, _KEEP_DAY))
    day = asked.get(_KEEP_DAY)
    if day is not None and not isinstance(day, bool):
        raise BadRequest(f"{_KEEP_DAY} must be true or false, not {json_type(day)}", param=_KEEP_DAY)
    seconds = asked.get(_KEEP)
    if seconds is None:
        return KEEP_S if day else 0
    if type(seconds) is not int or not 0 <= seconds <= MAX_KEEP_S:
        raise BadRequest(f"{_KEEP} must be a whole number from 0 to {MAX_KEEP_S}", param=_KEEP)
    return seconds


def read_test(body: bytes) -> str:
    """Of which type the sample is to be. Raises ``BadRequest``."""
    asked = _read(body, ("event_type",))
    event_type = asked.get("event_type")
    if event_type not in EVENT_TYPES:
        raise BadRequest(f"event_type must be one of {', '.join(EVENT_TYPES)}", param="event_type")
    return str(event_type)


def _read(body: bytes, fields: Collection[str]) -> Mapping[str, Any]:
    asked = read_object(body)
    unknown = sorted(asked.keys() - set(fields))
    if unknown:
        raise BadRequest(f"{unknown[0][:80]!r} is no field here: send {', '.join(fields)}", param=unknown[0][:80])
    return asked


def _url(asked: Mapping[str, Any], rules: UrlRules) -> str | None:
    url = asked.get("url")
    if url is None:
        return None
    if not isinstance(url, str):
        raise BadRequest(f"url must be text, not {json_type(url)}", param="url")
    check_url(url, rules)
    return url


def _events(asked: Mapping[str, Any]) -> tuple[str, ...] | None:
    events = asked.get("event_types")
    if events is None:
        return None
    if not isinstance(events, list) or not events:
        what = "empty" if events == [] else json_type(events)
        raise BadRequest(f"event_types must be a list of names, not {what}", param="event_types")
    for event in events:
        if event not in EVENT_TYPES and (event != ALL_EVENTS or len(events) > 1):
            raise BadRequest(
                f"event_types: {str(event)[:80]!r} is nothing that happens here: choose from {', '.join(EVENT_TYPES)}, "
                f'or ["{ALL_EVENTS}"] for all',
                param="event_types",
            )
    return tuple(dict.fromkeys(events))


def _name(asked: Mapping[str, Any]) -> str | None:
    name = asked.get("name")
    if name is None:
        return None
    if not isinstance(name, str):
        raise BadRequest(f"name must be text, not {json_type(name)}", param="name")
    if len(name) > NAME_CHARS or not name.isprintable():
        raise BadRequest(f"name must be at most {NAME_CHARS} printable characters", param="name")
    return name
