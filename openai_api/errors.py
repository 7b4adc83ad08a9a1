"""Errors as each API's clients read them: bodies and stream events in the dialect of the path.

Three dialects:

* ``OPENAI``: ``{"error": {"message", "type", "param", "code"}}``, in a stream as ``data: {"error": ...}``. Every path
  that is not named below.
* ``RESPONSES``: the same before a stream. Within one, ``event: error`` with ``"type": "error"`` and the next
  ``sequence_number``, as the Responses API documents it, and the ``error`` object, on which the SDKs raise.
* ``ANTHROPIC``: ``{"type": "error", "error": {"type", "message"}, "request_id"}``, in a stream as ``event: error``.
  Its SDKs ignore every event that has no name.

What an engine answers in another shape is read in :mod:`openai_api.engine_errors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from pydantic import BaseModel

from queue_schemas.errors import AttemptsExhausted, Conflict, DeadlineExceeded, InferqError

from .sse import encode_event

_MESSAGES_PATH = "/v1/messages"
_RESPONSES_PATH = "/v1/responses"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
_FINAL = (DeadlineExceeded, AttemptsExhausted, Conflict)
"""Errors with a status that SDKs retry by themselves, although the same request would end the same way."""
_PING = encode_event(b'{"type": "ping"}', "ping")
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?([0-9]{1,15})')


class Dialect(Enum):
    """How an API tells errors and keeps a silent stream alive."""

    OPENAI = auto()
    RESPONSES = auto()
    ANTHROPIC = auto()


def dialect_of(path: str) -> Dialect:
    """The dialect that the clients of ``path`` read."""
    if path == _MESSAGES_PATH or path.startswith(f"{_MESSAGES_PATH}/"):
        return Dialect.ANTHROPIC
    if path == _RESPONSES_PATH or path.startswith(f"{_RESPONSES_PATH}/"):
        return Dialect.RESPONSES
    return Dialect.OPENAI


class ErrorDetail(BaseModel):
    """OpenAI's error object. All four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """An error in no API's shape. ``status`` is the HTTP status that belongs to it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    details: Mapping[str, int] = field(default_factory=dict)
    """What else clients may read of it, beside those."""


def facts_of(error: InferqError) -> ErrorFacts:
    """The facts of one of our own errors, with its public message."""
    return ErrorFacts(error.status, error.public, error.type, error.param, error.code, error.details)


def error_body(facts: ErrorFacts, dialect: Dialect, request_id: str) -> bytes:
    """The JSON body of an answer that is an error."""
    if dialect is Dialect.ANTHROPIC:
        error = {"type": _anthropic_type(facts), "message": facts.message, **facts.details}
        return _json({"type": "error", "error": error, "request_id": request_id})
    return _json({"error": _openai(facts)})


def error_event(facts: ErrorFacts, dialect: Dialect, request_id: str, sent: bytes = b"") -> bytes:
    """The error as the last event of a stream; ``sent`` is what was sent of the stream last."""
    if dialect is Dialect.OPENAI:
        return encode_event(error_body(facts, dialect, request_id))
    if dialect is Dialect.ANTHROPIC:
        return encode_event(error_body(facts, dialect, request_id), "error")
    error = _openai(facts)
    fields = {"type": "error", "sequence_number": _next_number(sent), "error": error}
    body = _json(fields | {name: error[name] for name in ("code", "message", "param")})
    return encode_event(body, "error")


def keepalive(dialect: Dialect, comment: str) -> bytes:
    """Bytes that keep a silent stream alive between two events and are no event themselves.

    A comment is one line, without a blank line behind it. At a blank line, decoders that remember the last ``id``
    (openai for Python) or check nothing (openai for Go before 2026) report an event without data, and fail on it.
    """
    line = b": %b\n" % " ".join(comment.split()).encode("utf-8", "replace")
    return line + _PING if dialect is Dialect.ANTHROPIC else line


def is_final(error: InferqError) -> bool:
    """Whether a client that retries by status must be stopped from that (``x-should-retry: false``)."""
    return isinstance(error, _FINAL)


def openai_type(status: int) -> str:
    """The ``type`` of an error of which nothing but the status is known."""
    known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return known.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def _openai(facts: ErrorFacts) -> dict[str, Any]:
    return {"message": facts.message, "type": facts.type, "param": facts.param, "code": facts.code, **facts.details}


def _anthropic_type(facts: ErrorFacts) -> str:
    return _ANTHROPIC_TYPES.get(facts.status) or ("api_error" if facts.status >= 499 else "invalid_request_error")


def _next_number(sent: bytes) -> int:
    """The number behind the last event of a Responses stream."""
    numbers = _SEQUENCE_NUMBER.findall(sent)
    return int(numbers[-1]) + 1 if numbers else 0


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
