"""The Messages API of a simulated engine, as vLLM serves it: text and images in, text, reasoning and tool calls out."""

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
from .structured import Shape, json_shape
from .tools import Tool, required_tool, tool_list, tool_named
from .wire import Usage

PATH = "/v1/messages"
_THOUGHTS = 8
_ERROR_KINDS = {400: "invalid_request_error", 404: "not_found_error"}


def parse_messages(body: bytes, settings: SimulationSettings) -> Generate:
    """``POST /v1/messages``. A last message of the assistant is the beginning of the answer."""
    fields = parse_object(body)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedRequest("messages: Input should be a list of at least one message", param="messages")
    parts = [f"<|system|>{_text(fields['system'])}\n"] if fields.get("system") else []
    prefix, asked = "", ""
    for place, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise RefusedRequest("messages: each message has the role user or assistant", param="messages")
        text = _text(message.get("content"))
        if role == "assistant" and place == len(messages):
            prefix = text
        else:
            parts.append(f"<|{role}|>{text}\n")
            asked = text if role == "user" and place == len(messages) else ""
    limit = optional_int(fields, "max_tokens", least=1)
    if limit is None:
        raise RefusedRequest("max_tokens: Field required", param="max_tokens")
    known = fields | {"stop": fields.get("stop_sequences")}
    request = generate(known, settings, "".join(parts), asked, limit, api="messages", prefix=prefix)
    tools = [_tool(tool) for tool in tool_list(fields)]
    called = _tool_to_call(tools, fields.get("tool_choice"), asked)
    return replace(request, call=called, shape=_shape(fields) or request.shape, thoughts=_thoughts(fields))


def error_object(message: str, status: int) -> bytes:
    """An error as this API says it."""
    kind = _ERROR_KINDS.get(status, "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "\n".join(_part_text(part) for part in content)
    raise RefusedRequest("messages: content should be a string or a list of blocks", param="messages")


def _part_text(part: Fields) -> str:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if part.get("type") == "tool_result":
        return _text(part.get("content") or "")
    # What is not text counts as its type.
    return f"<|{part.get('type')}|>"


def _tool(tool: Fields) -> Tool:
    if tool.get("type") not in (None, "custom"):
        raise RefusedRequest(f"tools: type {tool['type']!r} is not supported by a simulated engine", param="tools")
    return tool_named(tool, "input_schema")


def _tool_to_call(tools: Sequence[Tool], choice: Any, asked: str) -> Tool | None:
    kind = choice.get("type") if isinstance(choice, dict) else "auto" if choice is None else ""
    if kind == "any":
        return required_tool(tools)
    if kind == "tool":
        return required_tool(tools, str(choice.get("name") or "(none)"))
    if kind == "auto":
        return next((tool for tool in tools if tool.name in asked), None)
    if kind != "none":
        raise RefusedRequest("tool_choice: type should be 'auto', 'any', 'tool' or 'none'", param="tool_choice")
    return None


def _shape(fields: Fields) -> Shape | None:
    config = fields.get("output_config")
    asked = (config.get("format") if isinstance(config, dict) else None) or fields.get("output_format")
    if asked is None:
        return None
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        raise RefusedRequest("output_config.format: type should be 'json_schema'", param="output_config")
    return json_shape(asked.get("schema"), "output_config.format.schema")


def _thoughts(fields: Fields) -> int:
    asked = fields.get("thinking")
    return _THOUGHTS if isinstance(asked, dict) and asked.get("type") == "enabled" else 0


class MessageWire:
    """A message: a block of thoughts where it thinks, then a text or a tool call."""

    def __init__(self, request: Generate, choices: Sequence[Choice], answer_id: str, created: int) -> None:
        self._request = request
        self._choice = choices[0]
        self._id = answer_id
        self.steps = len(self._choice.pieces)

    def whole(self, usage: Usage) -> bytes:
        """The whole answer as one object."""
        choice = self._choice
        content: list[Fields] = []
        if choice.thoughts:
            content.append(self._empty(0) | {"thinking": choice.thought})
        if choice.call:
            content.append(self._empty(choice.thoughts) | {"input": _arguments(choice.text)})
        else:
            content.append(self._empty(choice.thoughts) | {"text": choice.text})
        return orjson.dumps(self._message(usage) | self._end() | {"content": content})

    def opening(self) -> bytes:
        """What comes with the first token."""
        started = _event("message_start", message=self._message(Usage(self._request.prompt_tokens, 0, 0)))
        return started + self._start(0, 0)

    def tokens(self, start: int, end: int) -> bytes:
        """The deltas of engine steps ``start`` to ``end``; behind the last thought, the next block begins."""
        parts = []
        for step in range(start, min(end, self.steps)):
            if step and step == self._choice.thoughts:
                parts += [_event("content_block_stop", index=0), self._start(1, step)]
            piece = self._choice.pieces[step]
            index = int(0 < self._choice.thoughts <= step)
            parts.append(_event("content_block_delta", index=index, delta=self._delta(step, piece)))
        return b"".join(parts)

    def closing(self, usage: Usage) -> bytes:
        """The end of the stream."""
        last = int(0 < self._choice.thoughts < self.steps)
        return b"".join(
            (
                _event("content_block_stop", index=last),
                _event("message_delta", delta=self._end(), usage=_usage(usage)),
                _event("message_stop"),
            )
        )

    def _start(self, index: int, step: int) -> bytes:
        return _event("content_block_start", index=index, content_block=self._empty(step))

    def _empty(self, step: int) -> Fields:
        """The block to which the token at ``step`` belongs, before it has any."""
        if step < self._choice.thoughts:
            return {"type": "thinking", "thinking": "", "signature": ""}
        if self._choice.call:
            return {"type": "tool_use", "id": f"toolu_{self._id}", "name": self._choice.call, "input": {}}
        return {"type": "text", "text": ""}

    def _delta(self, step: int, piece: str) -> Fields:
        if step < self._choice.thoughts:
            return {"type": "thinking_delta", "thinking": piece}
        if self._choice.call:
            return {"type": "input_json_delta", "partial_json": piece}
        return {"type": "text_delta", "text": piece}

    def _message(self, usage: Usage) -> Fields:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _end(self) -> Fields:
        choice = self._choice
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        reason = reasons.get(choice.finish, "stop_sequence" if choice.stop else "end_turn")
        return {"stop_reason": reason, "stop_sequence": choice.stop}


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}  # cut short by max_tokens


def _usage(usage: Usage) -> Fields:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return encode_json({"type": kind, **fields}, kind)
