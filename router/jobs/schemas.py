"""Persisted jobs as their clients see them: the object, its states, and its answer as JSON."""

from __future__ import annotations

import base64
from typing import Any

import orjson

from queue_schemas import InferqError, MarkerKind, PersistedJob, State

from ..http.response_head import ResponseHead
from ..inference.attempt_merger import ending_error

STATUSES: dict[State, str] = {
    State.QUEUED: "queued",
    State.LEASED: "in_progress",
    State.LOST: "in_progress",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.DEAD: "failed",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
}
"""What a client is told. ``failed``: the engine answered with an error, or every attempt failed."""


def states_of(status: str) -> list[State]:
    """The states that a client knows as ``status``; all of them if it is empty."""
    return [state for state, told in STATUSES.items() if told == status]


def error_of(kept: PersistedJob) -> InferqError | None:
    """Why a job has no answer; None if it has one, or may get one."""
    if kept.state not in (State.DEAD, State.CANCELLED, State.EXPIRED):
        return None
    return ending_error(MarkerKind(kept.state.value), kept.cause)


def job_object(kept: PersistedJob, response: dict[str, Any] | None = None) -> dict[str, Any]:
    """A job as JSON. Times in seconds since 1970, null where there is none yet."""
    error = error_of(kept)
    return {
        "id": kept.id,
        "object": "job",
        "status": STATUSES[kept.state],
        "model": kept.model,
        "path": kept.metadata.path or None,
        "stream": kept.metadata.stream,
        "request_id": kept.metadata.request_id or None,
        "attempts": kept.attempts,
        "created_at": kept.created_ms // 1000,
        "started_at": _seconds(kept.started_ms),
        "ended_at": _seconds(kept.ended_ms),
        "deadline_at": kept.deadline_ms // 1000,
        "expires_at": _seconds(kept.expires_ms),
        "error": orjson.loads(error.body())["error"] if error else None,
        "response": response,
    }


def response_object(head: ResponseHead, body: bytes | None) -> dict[str, Any]:
    """An answer as JSON: JSON as it is, text as text, all else in base64. ``body`` is None if it is too large to be
    shown here."""
    encoding: str | None = None
    shown: Any = None
    if body is not None:
        shown, encoding = _shown(head, body)
    return {
        "status_code": head.status,
        "content_type": head.content_type,
        "headers": dict(head.headers),
        "body": shown,
        "encoding": encoding,
        "too_large": body is None,
    }


def _shown(head: ResponseHead, body: bytes) -> tuple[Any, str | None]:
    if head.is_json:
        try:
            return orjson.loads(body), "json"
        except orjson.JSONDecodeError:
            return body.decode("utf-8", "replace"), "text"
    if head.is_text:
        return body.decode("utf-8", "replace"), "text"
    return base64.b64encode(body).decode(), "base64"


def _seconds(milliseconds: int | None) -> int | None:
    return None if milliseconds is None else milliseconds // 1000
