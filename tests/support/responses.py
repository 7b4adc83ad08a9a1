"""Is it a response, or one of its events? Judged strictly by the types of the ``openai`` SDK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_BEYOND = {"store", "bytes"}
"""What the vendor's own answers have beyond the SDK's types."""


def check_event(event: dict[str, Any]) -> Any:
    """The event as the SDK's own type; raises where it lacks a field or has another one."""
    found = _EVENTS.validate_json(orjson.dumps(event), strict=True)
    _nothing_beyond(found, event["type"])
    return found


def check_response(response: dict[str, Any]) -> Response:
    """The same for the response object."""
    found = Response.model_validate_json(orjson.dumps(response), strict=True)
    _nothing_beyond(found, "response")
    return found


def check_stream(events: Sequence[dict[str, Any]]) -> Response:
    """A whole stream: each event in its shape, numbered from 0, the deltas adding up to what is said to be done, and
    the done items to the output of the response at its end, which is returned."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    said: dict[tuple[Any, ...], str] = {}
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        check_event(event)
        kind, place = event["type"], (event.get("item_id"), event.get("content_index"))
        if kind.endswith(".delta"):
            said[place] = said.get(place, "") + event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert event["text"] == said[place]
        elif kind == "response.refusal.done":
            assert event["refusal"] == said[place]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == said.get(place, "")
        elif kind == "response.output_item.done":
            items[event["output_index"]] = event["item"]
    ended = events[-1]["response"]
    if ended["status"] in ("completed", "incomplete"):
        assert [items[place] for place in sorted(items)] == ended["output"]
    return check_response(ended)


def _nothing_beyond(value: Any, where: str) -> None:
    if isinstance(value, BaseModel):
        beyond = set(value.model_extra or ()) - _BEYOND
        assert not beyond, f"{where} has {beyond}, which the SDK does not know"
        for name in value.model_fields_set - set(value.model_extra or ()):
            _nothing_beyond(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for one in value:
            _nothing_beyond(one, where)
