"""The Responses API of a simulated engine: text in, one message or one call of a function out, as vLLM serves it.

Nothing is kept: ``previous_response_id``, and with it all that is more than one turn, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from openai_api.sse import encode_json

from ..settings import SimulationSettings
from .answers import Choice
from .refusal import Fields, RefusedRequest
from .requests import Generate, generate, optional_int, parse_object
from .tools import response_tools, tool_to_call
from .wire import Usage

_REFUSED = ("previous_response_id", "conversation", "prompt")
_CALLS = ("function_call", "function_call_output", "reasoning")


def parse_responses(body: bytes, settings: SimulationSettings) -> Generate:
    """``POST /v1/responses``."""
    fields = parse_object(body)
    for name in _REFUSED:
        if fields.get(name):
            raise RefusedRequest(f"{name} is not supported by a simulated engine", param=name)
    instructions = fields.get("instructions")
    messages = [("system", instructions)] if isinstance(instructions, str) else []
    messages += _messages(fields)
    last_user = next((text for role, text in reversed(messages) if role == "user"), "")
    prompt = "".join(f"<|{role}|>{text}\n" for role, text in messages)
    limit = optional_int(fields, "max_output_tokens", least=1)
    request = generate(fields | _formatted(fields), settings, prompt, last_user, limit, api="responses")
    asked = last_user if messages and messages[-1][0] == "user" else ""
    called = tool_to_call(response_tools(fields), fields.get("tool_choice"), asked)
    repeated = {name: fields[name] for name in ("tools", "tool_choice", "text", "metadata") if fields.get(name)}
    return replace(request, call=called, fields=repeated)


def _formatted(fields: Fields) -> Fields:
    """``text.format`` as the ``response_format`` of a chat."""
    text = fields.get("text")
    asked = text.get("format") if isinstance(text, dict) else None
    if not isinstance(asked, dict):
        return {}
    return {"response_format": {"type": asked.get("type"), "json_schema": asked}}


def _messages(fields: Fields) -> list[tuple[str, str]]:
    given = fields.get("input")
    if isinstance(given, str):
        return [("user", given)]
    if not isinstance(given, list) or not given:
        raise RefusedRequest("input: Input should be a valid string or a list of messages", param="input")
    return [_message(item) for item in given]


def _message(item: Any) -> tuple[str, str]:
    if isinstance(item, dict) and item.get("type") in _CALLS:
        return "tool", str(item.get("output", item.get("arguments", "")))
    content = item.get("content") if isinstance(item, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not isinstance(item.get("role"), str):
        raise RefusedRequest("input: each item is a message with a role and text", param="input")
    return item["role"], content


class ResponseWire:
    """A response: one message, or one call of a function."""

    def __init__(self, request: Generate, choices: Sequence[Choice], answer_id: str, created: int) -> None:
        self._request = request
        self._choice = choices[0]
        self._id, self._created = answer_id, created
        self._item_id = answer_id.replace("resp_", "fc_" if self._choice.call else "msg_")
        self._number = 0
        self.steps = len(self._choice.pieces)

    def whole(self, usage: Usage) -> bytes:
        """The whole answer as one object."""
        return orjson.dumps(self._ended(usage))

    def opening(self) -> bytes:
        """What comes with the first token: everything is opened."""
        begun = self._response("in_progress")
        parts = [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", "")),
        ]
        if not self._choice.call:
            parts.append(self._event("response.content_part.added", **self._where(), part=_part("")))
        return b"".join(parts)

    def tokens(self, start: int, end: int) -> bytes:
        """The deltas of engine steps ``start`` to ``end``."""
        if self._choice.call:
            return b"".join(
                self._event("response.function_call_arguments.delta", **self._call(), delta=piece)
                for piece in self._choice.pieces[start:end]
            )
        return b"".join(
            self._event("response.output_text.delta", **self._where(), delta=piece, logprobs=[])
            for piece in self._choice.pieces[start:end]
        )

    def closing(self, usage: Usage) -> bytes:
        """Everything is closed."""
        text, ended = self._choice.text, self._ended(usage)
        if self._choice.call:
            said = {"arguments": text, "name": self._choice.call}
            parts = [self._event("response.function_call_arguments.done", **self._call(), **said)]
        else:
            parts = [
                self._event("response.output_text.done", **self._where(), text=text, logprobs=[]),
                self._event("response.content_part.done", **self._where(), part=_part(text)),
            ]
        parts.append(self._event("response.output_item.done", output_index=0, item=ended["output"][0]))
        parts.append(self._event(f"response.{ended['status']}", response=ended))
        return b"".join(parts)

    def _ended(self, usage: Usage) -> dict[str, Any]:
        status = "incomplete" if self._choice.finish == "length" else "completed"
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status) | {
            "incomplete_details": reason,
            "output": [self._item(status, self._choice.text)],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._request.model,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": None,
            **self._request.fields,
        }

    def _item(self, status: str, text: str) -> dict[str, Any]:
        call = self._choice.call
        if call:
            called = {"call_id": f"call_{self._item_id}", "name": call, "arguments": text}
            return {"id": self._item_id, "type": "function_call", "status": status, **called}
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)] if status != "in_progress" else [],
        }

    def _call(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return encode_json(event, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
