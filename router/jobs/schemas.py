"""Persisted jobs as clients see them: the job object, its status, and its answer as JSON."""

from __future__ import annotations

import base64
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field

from openai_api.errors import ErrorDetail
from queue_schemas import InferqError, MarkerKind, PersistedJob, State
from scheduling.prediction import Place

from ..http.response_head import ResponseHead
from ..inference.rules import ending_error

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
STATUSES: dict[State, JobStatus] = {
    State.QUEUED: "queued",
    State.LEASED: "in_progress",
    State.LOST: "in_progress",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.DEAD: "failed",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
}
"""The status that clients see. ``failed``: the engine answered with an error, or every attempt failed."""


class JobResponse(BaseModel):
    """The answer of a job: JSON as it is, text (a stream's, too) as text, all else in base64."""

    status_code: int
    content_type: str
    headers: dict[str, str] = Field(description="Those of the engine's that its client was to see")
    body: Any = Field(description="Null if it is too large to be shown here: read it at /output")
    encoding: Literal["json", "text", "base64"] | None
    too_large: bool


class JobObject(BaseModel):
    """A job. Times in seconds since 1970, null where there is none yet."""

    id: str
    object: Literal["job"]
    status: JobStatus
    model: str
    path: str | None
    stream: bool
    request_id: str | None
    attempts: int = Field(description="How often it was started")
    queue_position: int | None = Field(description="Its place among what waits, from 1; null if it does not wait")
    predicted_wait_ms: int | None = Field(description="Until it starts; null if that is unknown, or it does not wait")
    created_at: int
    started_at: int | None
    ended_at: int | None
    deadline_at: int = Field(description="When it expires unless it has ended")
    expires_at: int | None = Field(description="When it is deleted, with its answer")
    error: ErrorDetail | None = Field(description="Why it has no answer")
    response: JobResponse | None = Field(description="Its answer, once it has ended; never in a list")


class JobDeleted(BaseModel):
    """The job and its output are deleted."""

    id: str
    object: Literal["job"]
    deleted: bool


def states_of(status: str) -> list[State]:
    """The states whose status is ``status``; none if it is empty."""
    return [state for state, name in STATUSES.items() if name == status]


def error_of(job: PersistedJob) -> InferqError | None:
    """Why a job has no answer; None if it has one, or may get one."""
    if job.state not in (State.DEAD, State.CANCELLED, State.EXPIRED):
        return None
    return ending_error(MarkerKind(job.state.value), job.cause)


def job_object(job: PersistedJob, response: dict[str, Any] | None = None, place: Place | None = None) -> dict[str, Any]:
    """A job as JSON. Times in seconds since 1970, null where there is none yet."""
    error = error_of(job)
    return {
        "id": job.id,
        "object": "job",
        "status": STATUSES[job.state],
        "model": job.model,
        "path": job.metadata.path or None,
        "stream": job.metadata.stream,
        "request_id": job.metadata.request_id or None,
        "attempts": job.attempts,
        "queue_position": None if place is None or place.jobs_ahead is None else place.jobs_ahead + 1,
        "predicted_wait_ms": place and place.wait_ms,
        "created_at": job.created_ms // 1000,
        "started_at": _seconds(job.started_ms),
        "ended_at": _seconds(job.ended_ms),
        "deadline_at": job.deadline_ms // 1000,
        "expires_at": _seconds(job.expires_ms),
        "error": orjson.loads(error.body())["error"] if error else None,
        "response": response,
    }


def answer_object(head: ResponseHead, body: bytes | None) -> dict[str, Any]:
    """An answer as JSON: JSON as it is, text as text, all else in base64. ``body`` is None if it is too large."""
    encoding: str | None = None
    shown: Any = None
    if body is not None:
        shown, encoding = _encoded(head, body)
    return {
        "status_code": head.status,
        "content_type": head.content_type,
        "headers": dict(head.headers),
        "body": shown,
        "encoding": encoding,
        "too_large": body is None,
    }


def _encoded(head: ResponseHead, body: bytes) -> tuple[Any, str]:
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
