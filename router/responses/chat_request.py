"""Converts a Responses request into the streamed chat completion that answers it.

What a chat completion cannot say is refused; nothing is left out silently. Fields that the Responses API does not
define (an engine's own, such as ``top_k``) are passed on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from openai_api.metadata import check_metadata
from queue_schemas import BadRequest

from .chat_messages import chat_messages
from .json_fields import (
    Json,
    optional_bool,
    optional_int,
    optional_list,
    optional_number,
    optional_object,
    optional_text,
    optional_word,
    text_of,
    wrong,
)

LOGPROBS = "message.output_text.logprobs"
_INCLUDES = frozenset(
    {
        LOGPROBS, "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
        "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
        "web_search_call.results",
    }
)  # fmt: skip
"""What OpenAI's API defines. All but the first concern content that no answer here has."""
_FORMAT = frozenset({"type", "name", "schema", "strict", "description"})
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TIERS = ("auto", "default", "flex", "scale", "priority", "fast", "ultrafast")

_REFUSED: Mapping[str, str] = {
    "previous_response_id": "is not supported: send the items of the earlier turns as input",
    "conversation": "is not supported: send the items of the conversation as input",
    "prompt": "is not supported, as prompt templates are not kept here: send its text as instructions or input",
    "context_management": "is not supported: send a shorter input",
    "moderation": "is not supported: moderate with a request of its own",
    "access_programs": "is not supported: leave it out",
    "background_options": "is not supported: leave it out",
    "image": "is not supported: leave it out",
    "messages": "belongs to chat completions: send input",
    "n": "belongs to chat completions: a response is one answer",
    "functions": "belongs to chat completions: send tools",
    "response_format": "belongs to chat completions: send text.format",
    "max_tokens": "belongs to chat completions: send max_output_tokens",
    "max_completion_tokens": "belongs to chat completions: send max_output_tokens",
    "logprobs": f"belongs to chat completions: send include with {LOGPROBS}",
}
_OWN = frozenset(
    {
        "background", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "model",
        "parallel_tool_calls", "prompt_cache_options", "prompt_cache_retention", "reasoning", "service_tier", "store",
        "stream", "stream_options", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p",
        "truncation", "user",
    }
)  # fmt: skip
"""Fields of the Responses API that have another form, or none, in the chat completion."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The chat completion that answers a Responses request. ``body`` is its JSON."""

    body: bytes
    stream: bool
    """Whether the client asked for a stream of the response's events."""


def as_chat(request: Json) -> Chat:
    """The streamed chat completion for ``request``, a parsed body. Raises ``BadRequest`` for what it cannot say."""
    _check_depth(request)
    for name, why in _REFUSED.items():
        if request.get(name) is not None:
            raise wrong(name, why)
    check_metadata(request.get("metadata"))
    _check_unused_fields(request)
    chat: Json = {name: value for name, value in request.items() if name not in _OWN and name not in _REFUSED}
    chat |= {
        "model": text_of(request, "model"),
        "messages": chat_messages(optional_text(request, "instructions"), request.get("input")),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    converted = {
        "temperature": optional_number(request, "temperature", 2),
        "top_p": optional_number(request, "top_p", 1),
        "max_completion_tokens": optional_int(request, "max_output_tokens", 1),
        "user": optional_text(request, "user"),
        "response_format": _response_format(request),
        "verbosity": optional_text(optional_object(request, "text"), "verbosity", "text."),
        "reasoning_effort": optional_word(optional_object(request, "reasoning"), "effort", _EFFORTS, "reasoning."),
    }
    chat |= {name: value for name, value in converted.items() if value is not None}
    chat |= _tools(request) | _logprobs(request)
    return Chat(orjson.dumps(chat), bool(request.get("stream")))


def _check_depth(request: Json) -> None:
    """It is encoded again, some levels deeper: in the chat, in the response and in its events."""
    try:
        orjson.dumps([[[[[[[[request]]]]]]]])
    except orjson.JSONEncodeError:
        raise BadRequest("the request is nested too deeply: write flatter schemas and items") from None


def _check_unused_fields(request: Json) -> None:
    """Fields that are only repeated, or mean nothing here, must have the right type all the same."""
    optional_bool(request, "background")
    optional_bool(request, "stream")
    optional_int(request, "max_tool_calls", 1)
    optional_word(request, "service_tier", _TIERS)
    optional_object(request, "stream_options")
    if optional_word(request, "truncation", ("auto", "disabled")) == "auto":
        raise wrong("truncation", "cannot be auto here: leave it out, and send a shorter input if it does not fit")
    if optional_bool(request, "store") is False and request.get("background"):
        raise wrong("store", "cannot be false with background, whose answer is kept until it is fetched: leave it out")
    for place, name in enumerate(optional_list(request, "include")):
        if type(name) is not str or name not in _INCLUDES:
            raise wrong(f"include[{place}]", f"must be one of {', '.join(sorted(_INCLUDES))}")
    text = optional_object(request, "text")
    _check_known(text, {"format", "verbosity"}, "text.")
    _check_known(optional_object(text, "format", "text."), _FORMAT, "text.format.")
    _check_known(optional_object(request, "reasoning"), {"effort", "summary", "generate_summary"}, "reasoning.")


def _check_known(given: Json, names: Collection[str], at: str) -> None:
    for name in given:
        if name not in names:
            raise wrong(f"{at}{name[:80]}", "is not known here: leave it out")


def _response_format(request: Json) -> Json | None:
    given = optional_object(optional_object(request, "text"), "format", "text.")
    kind = given.get("type")
    if not given or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind == "json_schema":
        at = "text.format."
        if type(given.get("schema")) is not dict:
            raise wrong(f"{at}schema", "must be an object: a JSON schema")
        schema: Json = {"name": text_of(given, "name", at), "schema": given["schema"]}
        return {"type": kind, "json_schema": schema | _present(given, "strict", "description")}
    raise wrong("text.format.type", "must be one of text, json_object, json_schema")


def _tools(request: Json) -> Json:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``; without tools none of them."""
    parallel = optional_bool(request, "parallel_tool_calls")
    tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(optional_list(request, "tools"))]
    choice = _tool_choice(request.get("tool_choice"), {tool["function"]["name"] for tool in tools})
    if not tools:
        return {}
    found: Json = {"tools": tools, "tool_choice": choice}
    return found if parallel is None else found | {"parallel_tool_calls": parallel}


def _tool(tool: Any, at: str) -> Json:
    if type(tool) is not dict:
        raise wrong(at, "must be an object: a function")
    if tool.get("type") != "function":
        raise wrong(f"{at}.type", "must be function: there are no built-in tools here, so define one and call it")
    function: Json = {"name": text_of(tool, "name", f"{at}.")}
    return {"type": "function", "function": function | _present(tool, "description", "parameters", "strict")}


def _tool_choice(choice: Any, names: set[str]) -> str | Json:
    if choice is None:
        return "auto"
    if choice == "required" and not names:
        raise wrong("tool_choice", "is required, but there are no tools: send tools, or leave it out")
    if choice in ("none", "auto", "required"):
        return str(choice)
    if type(choice) is dict and choice.get("type") == "function":
        name = text_of(choice, "name", "tool_choice.")
        if name not in names:
            raise wrong("tool_choice.name", "is not the name of one of the tools")
        return {"type": "function", "function": {"name": name}}
    raise wrong("tool_choice", "must be none, auto, required, or a function with its name")


def _logprobs(request: Json) -> Json:
    top = optional_int(request, "top_logprobs", 0, 20)
    if LOGPROBS not in optional_list(request, "include") and not top:
        return {}
    return {"logprobs": True, "top_logprobs": top or 0}


def _present(fields: Json, *names: str) -> Json:
    return {name: fields[name] for name in names if fields.get(name) is not None}
