"""Cut the bytes of an engine's answer into the numbered frames of one attempt.

Rules:

* Frames of one attempt are numbered from 0 without a gap. The first has HEAD, the last END; a plain answer is one frame
  with both.
* A stream is cut only between server-sent events, so that an attempt that is lost never leaves half an event with a
  client. What follows the last border is kept until its event is complete, up to a limit.
* The standard allows CR, LF and CRLF as line ends, mixed, and a byte order mark at the beginning. Events leave with LF
  alone and without the mark: many clients understand nothing else. All else stays as the engine wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping

from openai_api.errors import dialect_of, error_body, error_event, facts_of, is_final
from openai_api.sse import MAX_EVENT_BYTES, end_of_events
from queue_schemas import CONTINUED, END, HEAD, Frame, InferqError, Lease
from queue_schemas.frames import FramePacker
from queue_schemas.headers import for_client

from .completeness import StreamEnd

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CR = 13


class FrameCutter:
    """Cuts the answer of one attempt. All results are packed frames, ready to publish or settle."""

    __slots__ = (
        "_after_cr",
        "_content_type",
        "_end",
        "_flags",
        "_headers",
        "_lease",
        "_mid_event",
        "_packer",
        "_sent",
        "_seq",
        "_status",
        "_tail",
    )

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._packer: FramePacker | None = None
        self._seq = 0
        self._tail = b""
        self._sent = b""
        self._status = 0
        self._content_type = ""
        self._headers: Mapping[str, str] = {}
        self._flags = HEAD
        self._end = StreamEnd(lease.job.path)
        self._after_cr = False
        """Whether the last piece ended with CR: an LF that begins the next one belongs to it."""
        self._mid_event = False
        """Whether the last frame ended within an event that is too long to be held."""

    @property
    def begun(self) -> bool:
        """Whether a frame was made: the client may have seen the beginning of an answer."""
        return self._seq > 0

    def whole(self, status: int, content_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """The one frame of a plain answer."""
        self._status, self._content_type = status, content_type
        self._headers = self._client_headers(headers)
        return self._frame(body, END)

    def head(
        self, status: int, content_type: str, *, continued: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        """A stream begins; its first frame will say so, and whether it goes on behind the job's prefix."""
        self._status, self._content_type = status, content_type
        self._headers = self._client_headers(headers)
        self._flags = HEAD | CONTINUED if continued else HEAD

    def feed(self, data: bytes) -> bytes:
        """A frame with the events that are complete now; empty if none is."""
        if _CR in data or self._after_cr:
            data = self._with_line_feeds(data)
        tail = self._tail
        if not tail and data.endswith(b"\n\n"):
            if self._seq and not self._mid_event:
                return self._frame(events, 0) if (events := self._end.feed(data)) else b""
            return self._events(data)
        if tail:
            data = tail + data
        border = end_of_events(data, len(tail))
        if border:
            self._tail = data[border:]
            return self._events(data[:border])
        if len(data) > MAX_EVENT_BYTES:
            self._tail = b""
            self._mid_event = True
            return self._frame(self._end.feed(data), 0)
        self._tail = data
        return b""

    def finish(self, *, delimited: bool) -> bytes | None:
        """The last frame of a stream whose engine has ended it; None if it was cut short. ``delimited``: length or
        chunks said where it ends."""
        tail, self._tail = self._tail, b""
        if self._mid_event:
            # Most of that event has left unread: only the transport can tell whether this is all of it.
            return self._frame(tail.rstrip(b"\n") + b"\n\n", END) if delimited else None
        if not self._seq:
            tail = tail.removeprefix(BYTE_ORDER_MARK)
        closing = self._end.missing_end(tail, self._lease.job.body, delimited=delimited)
        return None if closing is None else self._frame(closing, END)

    def end(self) -> bytes:
        """The last frame of a stream that is known to be complete, with the bytes that were held back."""
        tail, self._tail = self._tail, b""
        return self._frame(tail, END)

    def fail(self, error: InferqError) -> bytes:
        """The last frame of an attempt that ends in ``error``: an answer of its own, or an event in a begun stream."""
        self._tail = b""
        job, facts = self._lease.job, facts_of(error)
        dialect = dialect_of(job.path)
        if self.begun:
            return self._frame(error_event(facts, dialect, job.request_id, self._sent), END)
        # After more than one attempt a client's own retries would multiply the fabric's.
        headers = {"x-should-retry": "false"} if is_final(error) or self._lease.attempt > 1 else None
        return self.whole(error.status, "application/json", error_body(facts, dialect, job.request_id), headers)

    def _client_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str]:
        """Those of an answer's ``headers`` that go to the Router: none if it would not understand them."""
        return for_client(headers) if headers and self._lease.job.headers is not None else {}

    def _with_line_feeds(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _events(self, events: bytes) -> bytes:
        if not self._seq:
            events = events.removeprefix(BYTE_ORDER_MARK)
        self._mid_event = False
        events = self._end.feed(events)
        return self._frame(events, 0) if events else b""

    def _frame(self, data: bytes, flags: int) -> bytes:
        lease = self._lease
        seq = self._seq
        self._seq = seq + 1
        self._sent = data or self._sent
        if seq:
            packer = self._packer
            if packer is None:
                packer = self._packer = FramePacker(lease.job.id, lease.epoch, lease.attempt_id)
            return packer.pack(seq, flags, data)
        flags |= self._flags
        head = (self._status, self._content_type, self._headers)
        return Frame(lease.job.id, lease.epoch, lease.attempt_id, 0, flags, data, *head).pack()
