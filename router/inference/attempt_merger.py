"""Stitching: the frames and markers of a job's attempts become one answer without a gap or a repeat.

Rules:

* A frame counts if its epoch and attempt are the newest seen and its ``seq`` is the next. Older epochs and repeats are
  dropped; a ``seq`` that skips one means that frames were lost on the way, and the job has to run again (``gap``).
* A plain answer is handed out when it is complete. Of a stream, whole events are handed out as they come: half an
  event that a lost attempt left behind was never delivered. Only an event longer than ``MAX_EVENT_BYTES`` passes in
  pieces, and with it the stream can no longer go on with another attempt.
* A lost attempt that delivered nothing leaves no trace. After one that did, the next one goes on behind what was
  delivered, if it says that it does and was offered just that (:meth:`AttemptMerger.offer`). One that begins anew is
  checked against what was delivered, and followed where the first one stopped
  (:mod:`router.inference.replay_verifier`). Or the stream ends with an explicit error. * The frames of a persisted job
  can be read again from what is kept of it, so it never has to run again for their sake, and a continued attempt goes
  on behind the frames before it, however many: the next worker read the same. If the client had more of an earlier
  attempt that was replaced, it is compared until it has said as much.
"""

from __future__ import annotations

from collections.abc import Sequence

from openai_api.sse import DONE_EVENT, end_of_events, split_events
from openai_api.transcript import Transcript
from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    AttemptsExhausted,
    DeadlineExceeded,
    Frame,
    InferqError,
    JobCancelled,
    Marker,
    MarkerKind,
    OnLoss,
    StreamBroken,
)

from ..http.response_head import ResponseHead
from .replay_verifier import ContinuationVerifier, Following, ReplayVerifier

MAX_EVENT_BYTES = 1 << 20
"""How much of an event is held back until it is whole."""


class AttemptMerger:
    """The answer to one request, as far as it has come.

    Feed it with :meth:`on_frame` and :meth:`on_marker`. ``head`` is set once the answer may begin, :meth:`take` gives
    the bytes that may follow. Then either ``ended`` (all of it was given out), or ``error``. ``settled`` says that the
    queue has nothing left of the job. ``mid_event`` says that half an event was given out: nothing but its rest may
    follow. ``gap`` says that the job must run again under another id: call :meth:`restart`; or, if it is persisted,
    that its output is to be read from :attr:`position` on: call :meth:`reread`. ``lost_epoch`` is not 0 while the queue
    waits to hear where the stream goes on: tell it :meth:`offer`.
    """

    __slots__ = (
        "_attempt_head",
        "_attempt_id",
        "_before",
        "_choices",
        "_collected",
        "_delivered",
        "_epoch",
        "_following",
        "_last",
        "_next_seq",
        "_offered",
        "_on_loss",
        "_partial",
        "_pending",
        "_persisted",
        "_stream_asked",
        "_streams",
        "_transcript",
        "_usage",
        "compared",
        "continued",
        "ended",
        "error",
        "gap",
        "head",
        "lost_epoch",
        "mid_event",
        "pending_bytes",
        "settled",
        "stream",
    )  # fmt: skip

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
        ``persisted``: its job's output is persisted."""
        self.head: ResponseHead | None = None
        self.ended = False
        self.error: InferqError | None = None
        self.settled = False
        self.gap = False
        self.mid_event = False
        self.pending_bytes = 0
        self.stream = self._stream_asked = stream
        self.lost_epoch = 0
        self.continued = self.compared = 0
        """Attempts that went on behind what was delivered, and that began anew after something was."""
        self._on_loss = on_loss
        self._usage = usage
        self._choices = choices
        self._persisted = persisted
        self._epoch = 0
        self._attempt_id = ""
        self._next_seq = 0
        self._last = (0, 0, "")
        """The last frame taken of an attempt that is over: its epoch, seq and attempt."""
        self._attempt_head: ResponseHead | None = None
        self._streams = False
        self._pending: list[bytes] = []
        self._collected: list[bytes] = []
        self._delivered = False
        self._transcript = Transcript(replay_limit_bytes)
        self._partial = b""
        self._offered = ""
        self._following: Following | None = None
        self._before: Following | None = None
        """How the last attempt was followed that was."""

    @property
    def closed(self) -> bool:
        """Whether nothing more will come of it."""
        return self.ended or self.error is not None

    @property
    def untouched(self) -> bool:
        """Whether nothing has been heard of an attempt that may still run, nor given out of one that was lost."""
        return not self._attempt_id and not self._delivered

    @property
    def epoch(self) -> int:
        """The newest epoch that was heard of; 0: none."""
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

    def on_frame(self, frame: Frame) -> None:
        """A frame of the job came."""
        if self.closed or self.gap:
            return
        if (frame.attempt_id != self._attempt_id or frame.epoch != self._epoch) and not self._adopt(frame):
            return
        if frame.seq != self._next_seq:
            self.gap = frame.seq > self._next_seq
            return
        self._next_seq += 1
        try:
            self._take_in(frame)
        except StreamBroken as error:
            self.error = error
            self.settled = bool(frame.flags & END)

    def on_marker(self, marker: Marker) -> None:
        """The queue says what happened to the job."""
        if self.closed or marker.epoch < self._epoch:
            return
        if marker.kind is MarkerKind.REQUEUED:
            self._forget_attempt(marker.epoch)
        elif marker.kind is MarkerKind.LOST:
            if marker.epoch > self._epoch:
                self._forget_attempt(marker.epoch)
            if not self._attempt_id and not self.closed:
                self.lost_epoch = marker.epoch
        else:
            self.settled = True
            self.error = ending_error(marker.kind, marker.reason)

    def agrees(self, epoch: int, attempt_id: str) -> bool:
        """Whether an attempt that runs by the queue's account can be the one that is heard, or a later one."""
        return epoch > self._epoch or (epoch == self._epoch and self._attempt_id in ("", attempt_id))

    def expect(self, epoch: int, attempt_id: str = "") -> None:
        """Nothing counts from now on that is older than ``epoch``, and of it only that attempt, if one is named: what
        the queue forgot may still be put out by a worker that has not heard of it."""
        if self.closed or epoch < self._epoch or (epoch == self._epoch and self._attempt_id):
            return
        if epoch > self._epoch:
            # What was offered stands if nothing was heard since: nobody else offers anything.
            offered = "" if self._attempt_id else self._offered
            self._forget_attempt(epoch)
            self._offered = offered
        self._attempt_id = attempt_id

    def restart(self) -> None:
        """The job runs again under another id, whose epochs begin anew."""
        self._forget_attempt(0)

    def reread(self, epoch: int, attempt_id: str, frames: Sequence[Frame], *, given_up: bool = False) -> bool:
        """The output of the persisted job, now in ``epoch`` and this attempt, was read from :attr:`position` on: the
        ``frames`` are there. ``given_up``: the job ended without an answer, and has no attempt any more. False if it
        has to be read from its beginning: the queue has lost what was taken."""
        self.gap = False
        if (given_up or self.agrees(epoch, attempt_id)) and self._follow_on(frames):
            return True
        self._forget_attempt(0)
        return False

    def offer(self) -> str:
        """The text behind which the next attempt may go on; empty if it has to begin anew."""
        self._offered = ""
        if self._delivered and self._on_loss == "continue":
            self._offered = self._transcript.text or ""
        return self._offered

    def heard(self, epoch: int) -> None:
        """The queue was told where the stream goes on that was lost under ``epoch``."""
        if self.lost_epoch == epoch:
            self.lost_epoch = 0

    def _take_in(self, frame: Frame) -> None:
        """The next frame of the attempt that counts."""
        if frame.flags & HEAD:
            self._on_head(frame)
        if frame.data:
            self._on_data(frame.data)
        if frame.flags & END:
            self._on_end()

    def _last_taken(self) -> tuple[int, int, str]:
        return (self._epoch, self._next_seq - 1, self._attempt_id) if self._next_seq else self._last

    def _follow_on(self, frames: Sequence[Frame]) -> bool:
        """Whether kept ``frames`` can follow what was taken: its last frame still stands before them, or they begin
        anew."""
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
        """Whether ``frame`` begins an attempt that counts; what an older one left unfinished is forgotten then."""
        if frame.epoch < self._epoch or (frame.epoch == self._epoch and self._attempt_id):
            return False
        if self._attempt_id:
            self._forget_attempt(frame.epoch)
            if self.closed:
                return False
        self._epoch, self._attempt_id = frame.epoch, frame.attempt_id
        return True

    def _forget_attempt(self, epoch: int) -> None:
        self.gap = False
        self.lost_epoch = 0
        self._last = self._last_taken() if epoch else (0, 0, "")
        self._epoch = epoch
        self._attempt_id = ""
        self._next_seq = 0
        self._attempt_head = None
        self._streams = False
        self._collected.clear()
        self._partial = b""
        self._offered = ""
        self._before, self._following = self._following or self._before, None
        if not self._delivered:
            return
        try:
            self._take_stock()
        except StreamBroken as error:
            self.error = error

    def _take_stock(self) -> None:
        """What is there to do about a stream that was lost after some of it was delivered?"""
        transcript = self._transcript
        if self._persisted and transcript.too_long and self._on_loss != "fail":
            return  # an attempt that goes on can do without it; one that begins anew will find it missing
        if transcript.complete:
            self.ended = True
        elif self._has_all_choices() and (transcript.usage or not self._usage):
            self._pending.append(DONE_EVENT)
            self.ended = True
        elif self._on_loss == "fail":
            raise StreamBroken(
                "the worker of the stream was lost; it asked to end with an error then (x-inferq-on-loss)"
            )

    def _has_all_choices(self) -> bool:
        # One that has not begun is no choice that has ended.
        return self._transcript.finished and len(self._transcript.choices) >= self._choices

    def _on_head(self, frame: Frame) -> None:
        head = self._attempt_head = ResponseHead(frame.status, frame.content_type, frame.headers)
        self._streams = self._stream_asked and head.status < 400
        if self.head is None:
            self.head = head if self._streams else None
        elif head.is_event_stream != self.head.is_event_stream or not self._streams:
            raise StreamBroken(
                f"the stream cannot go on: its worker was lost, and another one answered with status {head.status}, "
                f"{head.content_type}; send the request again"
            )
        if self._streams and not head.is_event_stream:
            self._transcript.lose(StreamBroken(f"a stream of {head.content_type} cannot go on; send the request again"))
        if self._streams:
            self._follow(continued=bool(frame.flags & CONTINUED))

    def _follow(self, *, continued: bool) -> None:
        """How the attempt that begins now becomes what the client still lacks."""
        if continued and not (self._offered or (self._persisted and self._delivered)):
            raise StreamBroken("the stream cannot go on: its new attempt goes on behind something else; send it again")
        if continued:
            # The attempt before a persisted job's may have said less than the client had from one that it replaced.
            compared = self._before if self._persisted and isinstance(self._before, ReplayVerifier) else None
            self._following = compared or ContinuationVerifier(self._transcript)
            self.continued += 1
        elif self._delivered:
            self._following = ReplayVerifier(self._transcript)
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
        if not self._partial and data.endswith(b"\n\n"):
            self.mid_event = False
        else:
            data = self._partial + data
            end = end_of_events(data)
            self.mid_event = self.mid_event and not end
            self._partial = data[end:]
            data = data[:end]
            if len(self._partial) > MAX_EVENT_BYTES:
                if self._following is not None:
                    raise StreamBroken(
                        "the stream cannot go on: its worker was lost, and the new attempt has an event of more than "
                        f"{MAX_EVENT_BYTES} bytes, too long to be compared; send the request again"
                    )
                # Half an event passes as it is; from here no other attempt can take over.
                data, self._partial, self.mid_event = data + self._partial, b"", True
                self._transcript.lose(
                    StreamBroken(
                        f"the stream cannot go on: its worker was lost, and it had an event of more than "
                        f"{MAX_EVENT_BYTES} bytes; send the request again"
                    )
                )
        if self._following is not None:
            data = b"".join(map(self._following.feed, split_events(data)))
        if data:
            self._deliver(data)

    def _on_end(self) -> None:
        if self._streams:
            if self._following is not None:
                self._on_events(b"\n\n" if self._partial else b"")
                self._following.finish()
            elif self._partial:
                self._deliver(self._partial)
        else:
            self.head = self._attempt_head
            self._pending += self._collected
        self.settled = self.ended = True

    def _deliver(self, data: bytes) -> None:
        self._pending.append(data)
        self.pending_bytes += len(data)
        self._delivered = True
        self._transcript.add(data)


def _dead(reason: str) -> InferqError:
    return AttemptsExhausted(f"every attempt to answer the request failed, the last because {reason or 'it was lost'}")


def _cancelled(reason: str) -> InferqError:
    return JobCancelled(f"the request was cancelled: {reason or 'no reason was given'}")


def _expired(reason: str) -> InferqError:
    return DeadlineExceeded(f"the request was not answered in time: {reason or 'its deadline passed'}")


def ending_error(kind: MarkerKind, reason: str) -> InferqError:
    """The error that a client is told of a job that ended so, without an answer."""
    return _ERRORS[kind](reason)


_ERRORS = {MarkerKind.DEAD: _dead, MarkerKind.CANCELLED: _cancelled, MarkerKind.EXPIRED: _expired}
