"""Writes answers whose events carry ids: resumable streams, and the events of persisted jobs."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Send

from openai_api.sse import EVENT_STREAM
from queue_schemas import AttemptsExhausted, BadRequest, DeadlineExceeded, InferqError, JobCancelled, JobId

from ..http.response_head import ResponseHead
from ..http.response_writer import Header, ResponseWriter
from .event_ids import EventNumbers, Position

_EVENTS = ResponseHead(200, f"{EVENT_STREAM}; charset=utf-8")
_ENDINGS = (AttemptsExhausted, JobCancelled, DeadlineExceeded)
"""How a job ends without an answer."""


class ResumableWriter(ResponseWriter):
    """Adds ids to the events of a stream and leaves out those up to ``after``, which the client has. Any other answer
    passes as it is."""

    __slots__ = ("after",)

    def __init__(self, send: Send, request_id: bytes, after: Position | None, path: str = "") -> None:
        super().__init__(send, request_id, path)
        self.after = after
        self._client_events = EventNumbers(after, "", self._dialect, self._request_id)

    def bind_job(self, job_id: JobId) -> None:
        """Put the job's id into every event's id, so that an event's id alone says where to continue."""
        self._client_events = EventNumbers(self.after, f"{job_id}:", self._dialect, self._request_id)


class EventStreamWriter(ResumableWriter):
    """Writes the answer of a job as an event stream whatever it is: a plain one is one event; an end without an answer
    is an event with the error."""

    __slots__ = ()

    async def write(self, head: ResponseHead, data: bytes) -> None:
        if not head.is_event_stream:
            raise self._no_events(head)
        await super().write(head, data)

    async def finish(self, head: ResponseHead, data: bytes) -> None:
        if not head.is_event_stream:
            if not head.is_text and head.status < 400:
                raise self._no_events(head)
            data = self._as_last_event(head, data)
        await super().finish(_EVENTS, data)

    async def fail(
        self, error: InferqError, *, headers: Iterable[Header] = (), close: bool = False, mid_event: bool = False
    ) -> None:
        if not self.status and isinstance(error, _ENDINGS):
            await super().write(_EVENTS, b"")
        await super().fail(error, headers=headers, close=close, mid_event=mid_event)

    def _no_events(self, head: ResponseHead) -> BadRequest:
        return BadRequest(f"the answer of this job is {head.content_type}, which has no events: read it at /output")
