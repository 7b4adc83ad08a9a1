"""Turns the persisted chat of a background response into one stream of events, for any reader at any time.

Rules, beside those of :mod:`router.inference.merging.attempt_merger` about which frames count:

* Events are built from the persisted frames, never from what this client was sent: so every reader gets the same
  events with the same numbers.
* An attempt that starts over replaces the persisted frames. Its events must equal those built so far, to the byte;
  otherwise the stream ends with an error.
"""

from __future__ import annotations

from hashlib import blake2b

from openai_api.chat_chunks import ChatFailure
from openai_api.sse import EVENT_STREAM, encode_json
from queue_schemas import CONTINUED, END, HEAD, Frame, InferqError, Marker, MarkerKind, StreamBroken

from ..http.response_head import ResponseHead
from ..inference.merging.attempt_merger import AttemptMerger
from .events import ResponseEvents
from .json_fields import Json
from .schemas import ResponseRequest

FIRST_ENGINE_EVENT = 3
"""The number of the first event that depends on an engine's output."""
_BEGUN_ANEW = (
    "the response was restarted after its worker was lost, and may say something else now; read it from its beginning"
)


class PersistedResponseMerger(AttemptMerger):
    """The events behind number ``after`` (-1: all). ``epoch``: when the job was read, its answer had begun in it
    (:attr:`~queue_schemas.PersistedJob.output_epoch`); an answer that begins later is not the one whose events the
    client has."""

    __slots__ = ("_after", "_expected", "_hash", "_known_epoch", "_request", "_response")

    def __init__(self, request: ResponseRequest, after: int = -1, epoch: int = 0) -> None:
        super().__init__(stream=True, replay_limit_bytes=0, persisted=True)
        self.head = ResponseHead(200, f"{EVENT_STREAM}; charset=utf-8")
        self._request = request
        self._after = after
        self._known_epoch = epoch
        self._expected: tuple[int, bytes] = (0, b"")
        """How many events a new attempt must repeat, and their hash."""
        self._open()

    @property
    def response(self) -> Json:
        """The response as it is now."""
        return self._response.response()

    def on_marker(self, marker: Marker) -> None:
        """The queue says what happened to the job."""
        if self.closed:
            return
        super().on_marker(marker)
        error, self.error = self.error, None
        try:
            if error is not None:
                self._end_without_answer(marker.kind, error)
        except StreamBroken as broken:
            self.error = broken

    def _open(self) -> None:
        self._response = ResponseEvents(self._request)
        self._hash = blake2b(digest_size=16)
        self._emit(self._response.begin())

    def _apply(self, frame: Frame) -> None:
        if frame.flags & HEAD and not frame.flags & CONTINUED:
            if self._response.number >= FIRST_ENGINE_EVENT:
                self._restart()
            elif self._after >= FIRST_ENGINE_EVENT and frame.epoch > self._known_epoch:
                raise StreamBroken(_BEGUN_ANEW)
        self._emit(self._response.feed(frame))
        if frame.flags & END:
            self._end()

    def _restart(self) -> None:
        if self._response.number > self._expected[0]:
            self._expected = (self._response.number, self._hash.digest())
        self._open()
        self.compared += 1

    def _emit(self, events: list[Json]) -> None:
        repeated, digest = self._expected
        for event in events:
            number, data = event["sequence_number"], encode_json(event, event["type"])
            self._hash.update(data)
            if number == repeated - 1 and self._hash.digest() != digest:
                raise StreamBroken(_BEGUN_ANEW)
            if number >= repeated and number > self._after:
                self._pending.append(data)
                self.pending_bytes += len(data)

    def _end_without_answer(self, kind: MarkerKind, error: InferqError) -> None:
        if kind is MarkerKind.CANCELLED:
            self._emit(self._response.cancel(error.public))
        else:
            self._emit(self._response.fail(ChatFailure(error.public, error.status, error.code)))
        self._end()

    def _end(self) -> None:
        if self._response.number < self._expected[0]:
            raise StreamBroken(_BEGUN_ANEW)
        if self._after >= self._response.number:
            raise StreamBroken(
                f"the response has no event {self._after}, its last is {self._response.number - 1}: it is not the one "
                "that you had the beginning of; read it without starting_after"
            )
        self.ended = self.settled = True
