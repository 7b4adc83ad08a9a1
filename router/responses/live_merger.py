"""Turns the chat completion of a waiting client into its response, as it comes, for the relay."""

from __future__ import annotations

from dataclasses import replace

import orjson

from openai_api.chat_chunks import ChatFailure
from openai_api.errors import Dialect, ErrorFacts, error_body, openai_type
from openai_api.sse import EVENT_STREAM, encode_json
from queue_schemas import END, HEAD, Frame, JobId, OnLoss

from ..http.response_head import ResponseHead
from ..inference.merging.attempt_merger import AttemptMerger
from .events import ResponseEvents
from .json_fields import Json
from .schemas import ResponseRequest

_EVENTS = ResponseHead(200, f"{EVENT_STREAM}; charset=utf-8")
_ONE_OBJECT = ResponseHead(200, "application/json")


class LiveResponseMerger(AttemptMerger):
    """Turns what :class:`AttemptMerger` makes of the chat's attempts into the events of a response, or unless its
    client asked for a ``stream`` into the response at the end. An engine's refusal passes as it is."""

    __slots__ = ("_content_type", "_request", "_response", "_seq")

    def __init__(
        self,
        request: ResponseRequest,
        *,
        stream: bool,
        replay_limit_bytes: int,
        on_loss: OnLoss,
        persisted: bool = False,
    ) -> None:
        super().__init__(
            stream=True, replay_limit_bytes=replay_limit_bytes, on_loss=on_loss, usage=True, persisted=persisted
        )
        self.stream = stream
        self._request = request
        self._response = ResponseEvents(request)
        self._content_type = ""
        self._seq = 0

    def bind_job(self, job_id: JobId) -> None:
        """Name the response after ``job_id``, before anything is taken."""
        self._request = replace(self._request, job_id=job_id)
        self._response = ResponseEvents(self._request)

    def take(self) -> bytes:
        """What has come since the last call."""
        data = super().take()
        if self.head is None or not self._streams or not (data or self.ended):
            return data
        events = self._events(data, self.head)
        if self.stream:
            self.head = _EVENTS
            return b"".join(encode_json(event, event["type"]) for event in events)
        if not self.ended:
            return b""
        if self._response.failure is not None:
            # With a status of 200, SDKs would take its text, which is cut short, for the answer.
            return self._refusal(self._response.failure)
        self.head = _ONE_OBJECT
        return orjson.dumps(self._response.response())

    def _refusal(self, failure: ChatFailure) -> bytes:
        """The error of a chat that failed behind a head of status 200."""
        status = failure.status if failure.status >= 400 else 502
        self.head = ResponseHead(status, _ONE_OBJECT.content_type)
        facts = ErrorFacts(status, failure.message, failure.type or openai_type(status), failure.param)
        return error_body(facts, Dialect.RESPONSES, "")

    def _events(self, data: bytes, head: ResponseHead) -> list[Json]:
        """The events that ``data`` makes, which is merged from all attempts."""
        opening = [] if self._seq else self._response.begin()
        self._content_type = self._content_type or head.content_type
        flags = (0 if self._seq else HEAD) | (END if self.ended else 0)
        frame = Frame(self._request.job_id, 1, "", self._seq, flags, data, 200, self._content_type)
        self._seq += 1
        return opening + self._response.feed(frame)
