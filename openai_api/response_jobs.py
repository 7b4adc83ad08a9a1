"""A background response's id and final status, derived from its job and the job's persisted output.

A response is a persisted, streamed chat completion (:mod:`router.responses`). Only the finish reason of that stream
says whether it is ``completed`` or ``incomplete``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from queue_schemas.errors import BadMessage
from queue_schemas.frames import Frame
from queue_schemas.ids import JobId, shard_of_job
from queue_schemas.lifecycle import State

from .chat_chunks import ChatReader
from .transcript import Chunk

RESPONSE_PREFIX = "resp_"
RESPONSE_TOPIC = "response"
"""The topic of the persisted jobs that are responses, and so of the notices of their ends."""

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
IncompleteReason = Literal["max_output_tokens", "content_filter"]

_WITHOUT_OUTPUT: dict[State, ResponseStatus] = {
    State.QUEUED: "queued",
    State.LEASED: "in_progress",
    State.LOST: "in_progress",
    State.CANCELLED: "cancelled",
    State.DEAD: "failed",
    State.EXPIRED: "failed",
}
_INCOMPLETE: dict[str, IncompleteReason] = {"length": "max_output_tokens", "content_filter": "content_filter"}
_BROKEN_OFF = ("abort", "error")
"""Finish reasons by which vLLM says that it gave the answer up."""


def response_id(job_id: JobId) -> str:
    """The id of the response that ``job_id`` makes."""
    return RESPONSE_PREFIX + job_id


def job_of_response(name: str) -> JobId:
    """The job behind a response's id. Raises ``BadMessage`` for what cannot be one."""
    job_id = name.removeprefix(RESPONSE_PREFIX)
    if job_id == name:
        raise BadMessage(f"not a response's id: {name[:60]!r}")
    shard_of_job(job_id)
    return JobId(job_id)


def status_of_finish(finish: object) -> tuple[ResponseStatus, IncompleteReason | None]:
    """What a chat completion's finish reason (None: it has none) makes of a response, and why it is incomplete."""
    reason = _INCOMPLETE.get(finish) if type(finish) is str else None
    if reason is not None:
        return "incomplete", reason
    return ("failed" if finish is None or finish in _BROKEN_OFF else "completed"), None


def status_of_output(state: State, frames: Iterable[Frame]) -> ResponseStatus:
    """The status of a response whose job is in ``state``, with ``frames`` kept of it: all of them, if it has ended."""
    if state in _WITHOUT_OUTPUT:
        return _WITHOUT_OUTPUT[state]
    reader = ChatReader()
    finish: object = None
    for frame in frames:
        for chunk in reader.feed(frame):
            finish = finish or finish_of(chunk)
    return "failed" if reader.failure else status_of_finish(finish)[0]


def finish_of(chunk: Chunk) -> object:
    """The finish reason of the first choice that a chunk gives one for; None if it gives none."""
    return next((choice["finish_reason"] for choice in chunk["choices"] if choice.get("finish_reason")), None)
