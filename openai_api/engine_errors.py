"""Rewrite an engine's error, whatever its shape, as the error of its API, for the Router's clients.

Engines answer with OpenAI's error object, vLLM's older one (``{"object": "error", "message", ...}``), FastAPI's
``detail``, plain text, a proxy's HTML, or nothing. What is in the API's shape is passed on untouched; the rest is
rewritten, because SDKs read ``error.message`` and nothing else (openai for Node then shows "no body").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import orjson

from .errors import Dialect, ErrorFacts, error_body, error_event, openai_type

MAX_REFUSAL_BYTES = 1 << 20
"""A larger refusal is passed on unread."""
_MAX_MESSAGE = 4_000
_MAX_FAULTS = 10
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")


def facts_of_refusal(status: int, body: bytes) -> ErrorFacts:
    """The facts in an engine's answer with ``status`` 400 or above, whatever its ``body`` is."""
    parsed = _parsed(body)
    found = _facts_in(status, parsed) if type(parsed) is dict else None
    if found is not None:
        return found
    text = parsed if type(parsed) is str else _plain_text(body[: 16 * _MAX_MESSAGE].decode("utf-8", "replace"))
    message = text.strip()[:_MAX_MESSAGE] or f"the engine answered with status {status} and an empty body"
    return ErrorFacts(status, message, openai_type(status))


def shaped_refusal(status: int, body: bytes, dialect: Dialect, request_id: str) -> bytes | None:
    """An engine's refusal in the shape of its API; None if it is in that shape already, or too large to be read."""
    if len(body) > MAX_REFUSAL_BYTES:
        return None
    parsed = _parsed(body)
    if type(parsed) is dict:
        error = parsed.get("error")
        if dialect is Dialect.ANTHROPIC:
            if parsed.get("type") == "error" and type(error) is dict:
                return None
        elif error and type(error) in (dict, str):
            return None
    return error_body(facts_of_refusal(status, body), dialect, request_id)


def shaped_event(name: bytes, data: bytes, dialect: Dialect, request_id: str) -> bytes | None:
    """Rewrite an engine's error event (its ``name`` and ``data``) that the SDKs of its API would ignore; None for any
    other event."""
    parsed = _parsed(data)
    if type(parsed) is not dict:
        return None
    if parsed.get("error") and (dialect is not Dialect.ANTHROPIC or name):
        return None
    if not parsed.get("error") and parsed.get("object") != "error":
        return None
    facts = _facts_in(502, parsed)
    return None if facts is None else error_event(facts, dialect, request_id, data)


def _facts_in(status: int, parsed: dict[str, Any]) -> ErrorFacts | None:
    """The facts in a JSON object; None if it has none."""
    error = parsed.get("error")
    if type(error) is str and error:
        return ErrorFacts(status, error[:_MAX_MESSAGE], openai_type(status))
    detail_of = error if type(error) is dict else parsed
    message = detail_of.get("message")
    if type(message) is str and message:
        kind, param, code = detail_of.get("type"), detail_of.get("param"), detail_of.get("code")
        if status == 502 and type(code) is int and 400 <= code <= 599:
            status = code
        return ErrorFacts(
            status,
            message[:_MAX_MESSAGE],
            kind if type(kind) is str and kind else openai_type(status),
            param if type(param) is str else None,
            code if type(code) in (str, int) else None,
        )
    detail = parsed.get("detail")
    if type(detail) is str and detail:
        return ErrorFacts(status, detail[:_MAX_MESSAGE], openai_type(status))
    return _facts_of_faults(status, detail) if type(detail) is list and detail else None


def _facts_of_faults(status: int, detail: Sequence[Any]) -> ErrorFacts:
    """FastAPI's list of what is wrong with a request."""
    sentences: list[str] = []
    param = None
    for fault in detail[:_MAX_FAULTS]:
        if type(fault) is not dict:
            sentences.append(str(fault))
            continue
        place = fault.get("loc")
        where = ".".join(str(part) for part in place if part != "body") if type(place) is list else ""
        param = param or where or None
        sentences.append(f"{where}: {fault.get('msg')}" if where else str(fault.get("msg")))
    return ErrorFacts(status, "; ".join(sentences)[:_MAX_MESSAGE], openai_type(status), param)


def _plain_text(text: str) -> str:
    """``text``, or what a page of HTML says."""
    beginning = text[:1_000].lower()
    if "<html" not in beginning and "<!doctype" not in beginning:
        return text
    title = _TITLE.search(text)
    return " ".join(unescape(title[1] if title else _TAG.sub(" ", text)).split())


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
