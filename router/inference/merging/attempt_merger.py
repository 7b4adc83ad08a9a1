"""Merges the frames and markers of a job's attempts into one answer without a gap or a repeat, for the relay.

Rules:

* A frame counts if its epoch and attempt are the newest seen and its ``seq`` is the next. Older epochs and repeats are
  dropped; a skipped ``seq`` means that frames were lost on the way, and the job has to run again (``gap``).
* A plain answer is released when it is complete, a stream event by event as whole events come
  (:mod:`router.inference.merging.event_buffer`). Only an event longer than ``MAX_EVENT_BYTES`` is released in pieces;
  from then on no other attempt can take over the stream.
* A lost attempt that delivered nothing leaves no trace. After one that did, the next attempt either continues behind
  what was delivered, if it says so and was offered just that (:meth:`AttemptMerger.continuation_prefix`), or starts
  over: then it is compared with what was delivered, and followed from there
  (:mod:`router.inference.merging.attempt_filters`). Otherwise the stream ends with an explicit error.
* The output of a persisted job can be read again, so such a job never runs again because frames were lost. Its
  continued attempts follow the frames before them, however many: the next worker read the same. If the client had more
  of an earlier attempt that was replaced, a continued attempt is compared until it has said as much.
"""

from __future__ import annotations

from collections.abc import Sequence

from openai_api.sse import DONE_EVENT, MAX_EVENT_BYTES, split_events
from openai_api.transcript import Transcript
from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    Frame,
    InferqError,
    JobId,
    Marker,
    MarkerKind,
    OnLoss,
    StreamBroken,
)

from ...http.response_head import ResponseHead
from ..rules import ending_error
from .attempt_filters import AttemptFilter, ContinuationFilter, ReplayFilter
from .event_buffer import EventBuffer


class AttemptMerger:
    """The answer to one request, as far as it has come.

    Feed it with :meth:`on_frame` and :meth:`on_marker`. ``head`` is set once the answer may begin; :meth:`take` returns
    the bytes that may follow. It closes with ``ended`` (all of it was released) or ``error``. ``settled``: the queue
    has nothing left of the job. ``gap``: the job must run again under another id (:meth:`restart`), or if it is
    persisted its output must be read from :attr:`position` on (:meth:`reread`). ``lost_epoch`` is not 0 while the queue
    waits to be told where the stream continues: send it :meth:`continuation_prefix`. ``events`` were released so far.
    """

    __slots__ = (
        "_attempt_head",
        "_attempt_id",
        "_choices",
        "_collected",
        "_delivered",
        "_epoch",
        "_event_buffer",
        "_filter",
        "_last_of_previous",
        "_next_seq",
        "_on_loss",
        "_pending",
        "_persisted",
        "_prefix",
        "_previous_filter",
        "_stream_requested",
        "_streams",
        "_transcript",
        "_usage",
        "compared",
        "continued",
        "ended",
        "error",
        "events",
        "gap",
        "head",
        "lost_epoch",
        "pending_bytes",
        "settled",
        "stream",
    )

    def __init__(
        self,
        *,
        stream: bool,
        replay_limit_bytes: int,
        on_loss: OnLoss = "restart",
        usage: bool = False,
        choices: int = 1,
        persisted: bool = False,
    ) -> None:
        """``usage``: the client wants the usage at the end of its stream; ``choices``: how many it asked for;
        ``persisted``: the output of the job is kept."""
        self.head: ResponseHead | None = None
        self.ended = False
        self.error: InferqError | None = None
        self.settled = self.gap = False
        self.pending_bytes = self.events = 0
        self.stream = self._stream_requested = stream
        self.lost_epoch = 0
        self.continued = self.compared = 0
        """Attempts that continued behind what was delivered, and that started over after something was."""
        self._on_loss = on_loss
        self._usage = usage
        self._choices = choices
        self._persisted = persisted
        self._epoch = 0
        self._attempt_id = ""
        self._next_seq = 0
        self._last_of_previous = (0, 0, "")
        """The last frame taken of an attempt that is over: its epoch, seq and attempt."""
        self._attempt_head: ResponseHead | None = None
        self._streams = False
        self._pending: list[bytes] = []
        self._collected: list[bytes] = []
        self._event_buffer = EventBuffer()
        self._delivered = False
        self._transcript = Transcript(replay_limit_bytes)
        self._prefix = ""
        self._filter: AttemptFilter | None = None
        self._previous_filter: AttemptFilter | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more will come of it."""
        return self.ended or self.error is not None

    @property
    def mid_event(self) -> bool:
        """Whether half an event was released: only its rest may follow."""
        return self._event_buffer.mid_event

    @property
    def untouched(self) -> bool:
        """Whether no attempt that may still run was seen, and nothing released of one that was lost."""
        return not self._attempt_id and not self._delivered

    @property
    def epoch(self) -> int:
        """The newest epoch seen; 0: none."""
        return self._epoch

    @property
    def position(self) -> tuple[int, int]:
        """``(epoch, seq)`` of the last frame that was taken; ``(0, 0)`` if none was."""
        epoch, seq, _ = self._last_taken()
        return epoch, seq

    def take(self) -> bytes:
        """What has come since the last call."""
        pending = self._pending
        if not pending:
            return b""
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        self._pending = []
        self.pending_bytes = 0
        return data

    def bind_job(self, job_id: JobId) -> None:
        """The job is ``job_id``, known once it is queued. For subclasses whose answer names it."""

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of the job."""
        if self.ended or self.gap or self.error is not None:
            return
        if (frame.attempt_id != self._attempt_id or frame.epoch != self._epoch) and not self._adopt(frame):
            return
        if frame.seq != self._next_seq:
            self.gap = frame.seq > self._next_seq
            return
        self._next_seq += 1
        try:
            self._apply(frame)
        except StreamBroken as error:
            self.error = error
            self.settled = bool(frame.flags & END)

    def on_marker(self, marker: Marker) -> None:
        """Take the queue's notice of what happened to the job."""
        if self.closed or marker.epoch < self._epoch:
            return
        if marker.kind is MarkerKind.REQUEUED:
            self._reset_attempt(marker.epoch)
        elif marker.kind is MarkerKind.LOST:
            if marker.epoch > self._epoch:
                self._reset_attempt(marker.epoch)
            if not self._attempt_id and not self.closed:
                self.lost_epoch = marker.epoch
        else:
            self.settled = True
            self.error = ending_error(marker.kind, marker.reason)

    def may_continue_with(self, epoch: int, attempt_id: str) -> bool:
        """Whether the attempt that the queue says is running can be the one seen here, or a later one."""
        return epoch > self._epoch or (epoch == self._epoch and self._attempt_id in ("", attempt_id))

    def require_epoch(self, epoch: int, attempt_id: str = "") -> None:
        """From now on drop what is older than ``epoch``, and of it all but ``attempt_id`` if one is named: a worker may
        still send what the queue has forgotten."""
        if self.closed or epoch < self._epoch or (epoch == self._epoch and self._attempt_id):
            return
        if epoch > self._epoch:
            # The prefix that was sent still holds if no attempt was seen since: nobody else sends one.
            prefix = "" if self._attempt_id else self._prefix
            self._reset_attempt(epoch)
            self._prefix = prefix
        self._attempt_id = attempt_id

    def restart(self) -> None:
        """The job runs again under another id, whose epochs start over."""
        self._reset_attempt(0)

    def reread(self, epoch: int, attempt_id: str, frames: Sequence[Frame], *, unanswered: bool = False) -> bool:
        """Prepare for the ``frames`` of the persisted job, now in ``epoch`` and this attempt, read from
        :attr:`position` on. ``unanswered``: the job ended without an answer, and has no attempt any more. False if it
        has to be read from its beginning: the queue has lost what was taken."""
        self.gap = False
        if (unanswered or self.may_continue_with(epoch, attempt_id)) and self._can_follow(frames):
            return True
        self._reset_attempt(0)
        return False

    def continuation_prefix(self) -> str:
        """The text behind which the next attempt may continue; empty if it has to start over."""
        self._prefix = ""
        if self._delivered and self._on_loss == "continue":
            self._prefix = self._transcript.text or ""
        return self._prefix

    def on_resumed(self, epoch: int) -> None:
        """The queue was told where the stream continues that was lost under ``epoch``."""
        if self.lost_epoch == epoch:
            self.lost_epoch = 0

    def _apply(self, frame: Frame) -> None:
        """The next frame of the attempt that counts."""
        flags = frame.flags
        if flags & HEAD:
            self._on_head(frame)
        if frame.data:
            self._on_data(frame.data)
        if flags & END:
            self._on_end()

    def _last_taken(self) -> tuple[int, int, str]:
        return (self._epoch, self._next_seq - 1, self._attempt_id) if self._next_seq else self._last_of_previous

    def _can_follow(self, frames: Sequence[Frame]) -> bool:
        """Whether ``frames`` can follow what was taken: they begin with its last frame, or start over."""
        last = self._last_taken()
        if not last[0]:
            return True
        if not frames:
            return False
        first = frames[0]
        if (first.epoch, first.seq, first.attempt_id) == last:
            return all(frame.epoch >= self._epoch for frame in frames[1:2])  # else it would be passed over
        return first.flags & (HEAD | CONTINUED) == HEAD and first.epoch > last[0] and first.epoch >= self._epoch

    def _adopt(self, frame: Frame) -> bool:
        """Whether ``frame`` begins an attempt that counts; what an older one left unfinished is dropped then."""
        if frame.epoch < self._epoch or (frame.epoch == self._epoch and self._attempt_id):
            return False
        if self._attempt_id:
            self._reset_attempt(frame.epoch)
            if self.closed:
                return False
        self._epoch, self._attempt_id = frame.epoch, frame.attempt_id
        return True

    def _reset_attempt(self, epoch: int) -> None:
        self.gap = False
        self.lost_epoch = 0
        self._last_of_previous = self._last_taken() if epoch else (0, 0, "")
        self._epoch = epoch
        self._attempt_id = ""
        self._next_seq = 0
        self._attempt_head = None
        self._streams = False
        self._collected.clear()
        self._event_buffer.discard()
        self._prefix = ""
        self._previous_filter, self._filter = self._filter or self._previous_filter, None
        if not self._delivered:
            return
        try:
            self._decide_after_loss()
        except StreamBroken as error:
            self.error = error

    def _decide_after_loss(self) -> None:
        """End or fail a stream that was lost after a part was delivered, unless another attempt may take it over."""
        transcript = self._transcript
        if self._persisted and transcript.too_long and self._on_loss != "fail":
            return  # an attempt that continues does not need it; one that starts over finds it missing
        if transcript.complete:
            self.ended = True
        elif self._has_all_choices() and (transcript.usage or not self._usage):
            self._pending.append(DONE_EVENT)
            self.ended = True
        elif self._on_loss == "fail":
            raise StreamBroken(
                "the worker of the stream was lost, and the request asks to fail then (x-inferq-on-loss)"
            )

    def _has_all_choices(self) -> bool:
        # A choice that has not begun has not ended.
        return self._transcript.finished and len(self._transcript.choices) >= self._choices

    def _on_head(self, frame: Frame) -> None:
        head = self._attempt_head = ResponseHead(frame.status, frame.content_type, frame.headers)
        self._streams = self._stream_requested and head.status < 400
        if self.head is None:
            self.head = head if self._streams else None
        elif head.is_event_stream != self.head.is_event_stream or not self._streams:
            raise StreamBroken(
                f"the stream cannot continue: its worker was lost, and another one answered with status {head.status}, "
                f"{head.content_type}; send the request again"
            )
        if self._streams and not head.is_event_stream:
            self._transcript.mark_untracked(
                StreamBroken(f"a stream of {head.content_type} cannot continue; send the request again")
            )
        if self._streams:
            self._start_verifying(continued=bool(frame.flags & CONTINUED))

    def _start_verifying(self, *, continued: bool) -> None:
        """Choose what turns the attempt that begins now into what the client still lacks."""
        if continued and not (self._prefix or (self._persisted and self._delivered)):
            raise StreamBroken("the stream cannot continue: its new attempt continues another text; send it again")
        if continued:
            # The previous attempt of a persisted job may have said less than the client had of one that it replaced.
            compared = (
                self._previous_filter if self._persisted and isinstance(self._previous_filter, ReplayFilter) else None
            )
            self._filter = compared or ContinuationFilter(self._transcript)
            self.continued += 1
        elif self._delivered:
            self._filter = ReplayFilter(self._transcript)
            self.compared += 1

    def _on_data(self, data: bytes) -> None:
        head = self._attempt_head
        if not self._streams or head is None:
            self._collected.append(data)
        elif head.is_event_stream:
            self._on_events(data)
        else:
            self._deliver(data)

    def _on_events(self, data: bytes) -> None:
        buffer, events = self._event_buffer, data
        if buffer.held or buffer.mid_event or not data.endswith(b"\n\n"):  # else it is whole events already
            events = buffer.feed(data)
            if buffer.overfull:
                events += self._release_long_event()
        if self._filter is not None:
            events = b"".join(map(self._filter.feed, split_events(events)))
        if events:
            self._deliver(events)

    def _release_long_event(self) -> bytes:
        """Half an event, as it is. From here on no other attempt can take over."""
        if self._filter is not None:
            raise StreamBroken(
                "the stream cannot continue: its worker was lost, and the new attempt has an event of more than "
                f"{MAX_EVENT_BYTES} bytes, too long to be compared; send the request again"
            )
        self._transcript.mark_untracked(
            StreamBroken(
                f"the stream cannot continue: its worker was lost, and it had an event of more than {MAX_EVENT_BYTES} "
                "bytes; send the request again"
            )
        )
        return self._event_buffer.release()

    def _on_end(self) -> None:
        if self._streams:
            if self._filter is not None:
                self._on_events(b"\n\n" if self._event_buffer.held else b"")
                self._filter.finish()
            elif self._event_buffer.held:
                self._deliver(self._event_buffer.held)
        else:
            self.head = self._attempt_head
            self._pending += self._collected
            self.pending_bytes += sum(map(len, self._collected))
        self.settled = self.ended = True

    def _deliver(self, data: bytes) -> None:
        self._pending.append(data)
        self.pending_bytes += len(data)
        self._delivered = True
        self.events += data.count(b"\n\n")
        self._transcript.add(data)
