"""The response object and the items in it, in the shapes of the Responses API.

Source: the OpenAI API reference of Responses, as the types of the ``openai`` SDK have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai_api.chat_chunks import ChatFailure
from openai_api.response_jobs import IncompleteReason, ResponseStatus, response_id
from queue_schemas import JobId

from .fields import Json
from .messages import input_items

_SHOWN: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": "",
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "auto",
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""What a response repeats of its request, and what it says where the request is silent."""
_ITEM_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a response from its beginning. ``created_at`` is in Unix seconds; ``request`` is the client's,
    parsed."""

    job_id: JobId
    created_at: int
    request: Json
    background: bool = True


def response_object(
    asked: Asked,
    status: ResponseStatus,
    output: Sequence[Json] = (),
    *,
    usage: Json | None = None,
    incomplete: IncompleteReason | None = None,
    error: Json | None = None,
    completed_at: int | None = None,
) -> Json:
    """The response as it is now."""
    request = asked.request
    shown = {name: request[name] if request.get(name) is not None else silent for name, silent in _SHOWN.items()}
    text = shown["text"]
    return {
        "id": response_id(asked.job_id),
        "object": "response",
        "created_at": asked.created_at,
        "status": status,
        "background": asked.background,
        "completed_at": completed_at,
        "error": error,
        "incomplete_details": {"reason": incomplete} if incomplete else None,
        **shown,
        "output": list(output),
        "previous_response_id": None,
        "store": request.get("store") is not False,
        "text": text if text.get("format") else {**text, "format": {"type": "text"}},
        "usage": usage,
    }


def item_id(kind: str, job_id: JobId, place: int | str) -> str:
    """The id of an item: the same each time the response is built."""
    return f"{_ITEM_PREFIXES.get(kind, 'item')}_{job_id}_{place}"


def message_item(name: str, status: str, content: Sequence[Json] = ()) -> Json:
    """What the model said."""
    return {"id": name, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def text_part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    """Text in a message."""
    return {"type": "output_text", "annotations": [], "logprobs": list(logprobs), "text": text}


def refusal_part(text: str) -> Json:
    """A refusal in a message."""
    return {"type": "refusal", "refusal": text}


def reasoning_part(text: str) -> Json:
    """Text in a reasoning item."""
    return {"type": "reasoning_text", "text": text}


def reasoning_item(name: str, status: str, content: Sequence[Json] = ()) -> Json:
    """What the model thought."""
    return {"id": name, "type": "reasoning", "status": status, "summary": [], "content": list(content)}


def call_item(name: str, status: str, call_id: str, function: str, arguments: str) -> Json:
    """A call of one of the client's functions."""
    return {
        "id": name,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": function,
        "arguments": arguments,
    }


def response_usage(usage: Json) -> Json:
    """A chat completion's usage, as a response tells it."""
    asked, said = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    prompt, completion = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": _count(prompt, "cached_tokens"), "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": _count(completion, "reasoning_tokens")},
        "total_tokens": asked + said,
    }


def response_logprobs(logprobs: Any) -> list[Json]:
    """A chat choice's log probabilities, as a response tells them; none of what is not as it should be."""
    content = logprobs.get("content") if type(logprobs) is dict else None
    return [
        _logprob(entry)
        | {"top_logprobs": [_logprob(other) for other in entry.get("top_logprobs") or () if type(other) is dict]}
        for entry in content or ()
        if type(entry) is dict
    ]


def response_error(failure: ChatFailure) -> Json:
    """Why there is no answer. The API knows few codes; the message says what to do."""
    if failure.status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "invalid_prompt" if 400 <= failure.status < 499 else "server_error"
    return {"code": code, "message": failure.message, "type": failure.type, "param": failure.param}


def listed_input(asked: Asked) -> list[Json]:
    """The request's input, as ``GET /v1/responses/{id}/input_items`` lists it: each item with an id, oldest first."""
    return [_listed(item, place, asked.job_id) for place, item in enumerate(input_items(asked.request.get("input")))]


def _listed(item: Json, place: int, job_id: JobId) -> Json:
    kind = item.get("type", "message")
    shown = {**item, "id": item.get("id") or item_id(kind, job_id, f"in{place}"), "type": kind}
    if kind != "reasoning":
        shown["status"] = item.get("status") or "completed"
    if kind == "message" and type(item.get("content")) is str:
        answered = item.get("role") == "assistant"
        shown["content"] = [text_part(item["content"]) if answered else {"type": "input_text", "text": item["content"]}]
    return shown


def _logprob(entry: Json) -> Json:
    token, logprob, raw = str(entry.get("token", "")), entry.get("logprob"), entry.get("bytes")
    return {
        "token": token,
        "bytes": raw if type(raw) is list else list(token.encode("utf-8", "replace")),
        "logprob": logprob if type(logprob) in (int, float) else -9999.0,
    }


def _count(fields: Any, name: str) -> int:
    value = fields.get(name) if type(fields) is dict else None
    return value if type(value) is int else 0
