"""Responses as clients see them: the response object and its items, in the shapes of the Responses API.

Source: the OpenAI API reference of Responses, as the types of the ``openai`` SDK have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from openai_api.chat_chunks import ChatFailure
from openai_api.response_jobs import IncompleteReason, ResponseStatus, response_id
from queue_schemas import JobId

from .chat_messages import input_items
from .json_fields import Json

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
"""Fields of the request that a response repeats, with their defaults."""
_ITEM_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class ResponseObject(BaseModel, extra="allow"):
    """A response, as the OpenAI API reference describes it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]


class ResponseDeleted(BaseModel):
    """The response and its output are deleted."""

    id: str
    object: Literal["response"]
    deleted: bool


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """The request that ``job_id`` answers. ``created_at`` is in Unix seconds; ``body`` is the client's, parsed."""

    job_id: JobId
    created_at: int
    body: Json
    background: bool = True


def response_object(
    request: ResponseRequest,
    status: ResponseStatus,
    output: Sequence[Json] = (),
    *,
    usage: Json | None = None,
    incomplete: IncompleteReason | None = None,
    error: Json | None = None,
    completed_at: int | None = None,
) -> Json:
    """The response as it is now."""
    body = request.body
    shown = {name: body[name] if body.get(name) is not None else default for name, default in _SHOWN.items()}
    text = shown["text"]
    return {
        "id": response_id(request.job_id),
        "object": "response",
        "created_at": request.created_at,
        "status": status,
        "background": request.background,
        "completed_at": completed_at,
        "error": error,
        "incomplete_details": {"reason": incomplete} if incomplete else None,
        **shown,
        "output": list(output),
        "previous_response_id": None,
        "store": body.get("store") is not False,
        "text": text if text.get("format") else {**text, "format": {"type": "text"}},
        "usage": usage,
    }


def item_id(kind: str, job_id: JobId, place: int | str) -> str:
    """The id of an item: the same each time the response is built."""
    return f"{_ITEM_PREFIXES.get(kind, 'item')}_{job_id}_{place}"


def message_item(name: str, status: str, content: Sequence[Json] = ()) -> Json:
    """An answer of the model."""
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
    """Reasoning of the model."""
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
    """A chat completion's usage in the shape of a response's."""
    input_tokens, output_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    prompt, completion = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": _count(prompt, "cached_tokens"), "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": _count(completion, "reasoning_tokens")},
        "total_tokens": input_tokens + output_tokens,
    }


def response_logprobs(logprobs: Any) -> list[Json]:
    """A chat choice's log probabilities in the shape of a response's; malformed ones are left out."""
    content = logprobs.get("content") if type(logprobs) is dict else None
    return [
        _logprob(entry)
        | {"top_logprobs": [_logprob(other) for other in entry.get("top_logprobs") or () if type(other) is dict]}
        for entry in content or ()
        if type(entry) is dict
    ]


def response_error(failure: ChatFailure) -> Json:
    """Why there is no answer. The API defines few codes; the message says what to do."""
    if failure.status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "invalid_prompt" if 400 <= failure.status < 499 else "server_error"
    return {"code": code, "message": failure.message, "type": failure.type, "param": failure.param}


def input_item_objects(request: ResponseRequest) -> list[Json]:
    """The request's input, as ``GET /v1/responses/{id}/input_items`` lists it: each item with an id, oldest first."""
    return [
        _item_object(item, place, request.job_id) for place, item in enumerate(input_items(request.body.get("input")))
    ]


def _item_object(item: Json, place: int, job_id: JobId) -> Json:
    kind = item.get("type", "message")
    shown = {**item, "id": item.get("id") or item_id(kind, job_id, f"in{place}"), "type": kind}
    if kind != "reasoning":
        shown["status"] = item.get("status") or "completed"
    if kind == "message" and type(item.get("content")) is str:
        from_assistant = item.get("role") == "assistant"
        shown["content"] = [
            text_part(item["content"]) if from_assistant else {"type": "input_text", "text": item["content"]}
        ]
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
