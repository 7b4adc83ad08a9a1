"""Read a chat completion's frames, streamed or whole, as chunks, for `/v1/responses` and the notifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from queue_schemas.frames import END, HEAD, Frame

from .engine_errors import facts_of_refusal
from .errors import ErrorFacts
from .sse import DONE, EVENT_STREAM, end_of_events, event_data, split_events
from .transcript import Chunk

_NO_COMPLETION = "the engine's answer is not a chat completion"


@dataclass(frozen=True, slots=True)
class ChatFailure:
    """Why there is no (whole) answer. ``status`` is the HTTP status it was, or would have been, answered with."""

    message: str
    status: int = 502
    type: str | None = None
    param: str | None = None


class ChatReader:
    """Feed it the frames of one attempt, and of those that went on behind it. ``failure`` is set when the answer turned
    out to be an error, ``over`` once nothing follows: then nothing more is read."""

    __slots__ = ("_is_stream", "_kept", "_status", "failure", "over")

    def __init__(self) -> None:
        self._kept = b""
        self._is_stream = False
        self._status = 0
        self.failure: ChatFailure | None = None
        self.over = False

    def feed(self, frame: Frame) -> list[Chunk]:
        """The chunks that ``frame`` completes. A whole answer gives one, with ``message`` as its ``delta``."""
        if self.over:
            return []
        if frame.flags & HEAD:
            self._kept = b""  # half an event that a lost attempt left behind does not count
            self._status = frame.status
            self._is_stream = frame.status < 400 and frame.content_type.startswith(EVENT_STREAM)
        ended = bool(frame.flags & END)
        data = self._kept + frame.data if self._kept else frame.data
        if not self._is_stream:
            self._kept = data
            chunks = self._whole(data) if ended else []
        else:
            border = len(data) if ended else end_of_events(data)
            self._kept = data[border:]
            chunks = self._events(data[:border])
        self.over = self.over or ended
        return chunks

    def _events(self, data: bytes) -> list[Chunk]:
        chunks = []
        for event in split_events(data):
            payload = event_data(event)
            if payload == DONE:
                self.over = True
            elif payload and (chunk := self._chunk(payload)) is not None:
                chunks.append(chunk)
            if self.over:
                break
        return chunks

    def _whole(self, data: bytes) -> list[Chunk]:
        chunk = self._chunk(data)
        if chunk is None:
            return []
        # As a stream would bring it, in one piece.
        return [chunk | {"choices": [{**choice, "delta": choice.get("message")} for choice in chunk["choices"]]}]

    def _chunk(self, data: bytes) -> Chunk | None:
        try:
            chunk: Any = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if self._status >= 400:
            self._fail(_failure(facts_of_refusal(self._status, data)))
        elif type(chunk) is dict and (chunk.get("error") or chunk.get("object") == "error"):
            self._fail(_failure(facts_of_refusal(502, data)))
        elif type(chunk) is dict and type(chunk.get("choices")) is list:
            return chunk | {"choices": [choice for choice in chunk["choices"] if type(choice) is dict]}
        else:
            self._fail(ChatFailure(_NO_COMPLETION))
        return None

    def _fail(self, failure: ChatFailure) -> None:
        self.failure = failure
        self.over = True


def _failure(facts: ErrorFacts) -> ChatFailure:
    return ChatFailure(facts.message, facts.status, facts.type, facts.param)
