"""Frames of answers and markers about attempts: what workers and scripts send to Routers, packed and unpacked.

An entry of a reply stream holds either field ``f``, a run of packed frames one behind the other (written by workers
and by the settle script), or field ``m``, one marker as text (written by scripts, which do not speak msgpack).

A Router accepts a frame if its ``(epoch, attempt_id)`` is the newest it has seen for the job and its ``seq`` is the
next; everything else is a leftover of a lost attempt or a repeat, and is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from struct import Struct
from typing import Any

from . import codec
from . import headers as http_headers
from .errors import BadMessage
from .ids import JobId
from .records import record

HEAD = 1
"""The frame carries status and content type: the first of an attempt."""
END = 2
"""The frame is the attempt's last: the answer is complete."""
CONTINUED = 4
"""With HEAD: the attempt continues the job's ``prefix``. Without it, the attempt starts the answer again."""

FRAME_FIELD = b"f"
MARKER_FIELD = b"m"


@record
class Frame:
    """A piece of an attempt's answer. ``seq`` counts from 0 within the attempt; ``flags`` combine HEAD, END and
    CONTINUED.

    ``status``, ``content_type`` and ``headers`` (those that the client is to see: :mod:`queue_schemas.headers`) count
    only with HEAD. A plain answer is one frame with both flags.
    """

    job_id: JobId
    epoch: int
    attempt_id: str
    seq: int
    flags: int
    data: bytes
    status: int = 0
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)

    def pack(self) -> bytes:
        """msgpack array: ``[job_id, epoch, attempt_id, seq, flags, data]``, with HEAD also ``status, content_type``,
        and ``headers`` if there are any."""
        fields: list[Any] = [self.job_id, self.epoch, self.attempt_id, self.seq, self.flags, self.data]
        if self.flags & HEAD:
            fields += (self.status, self.content_type)
            if self.headers:
                fields.append(dict(self.headers))
        return codec.encode(fields)


class FramePacker:
    """Packs the frames of one attempt that have no HEAD: :meth:`pack` gives what :meth:`Frame.pack` would, for a fifth
    of the time. What is the same in all of them is packed once."""

    __slots__ = ("_prefix",)

    def __init__(self, job_id: JobId, epoch: int, attempt_id: str) -> None:
        self._prefix = b"\x96" + b"".join(map(codec.encode, (job_id, epoch, attempt_id)))

    def pack(self, seq: int, flags: int, data: bytes) -> bytes:
        """The frame with these fields; ``flags`` is END or 0."""
        size = len(data)
        if size < 1 << 8:
            end = _BIN_8(flags, 0xC4, size)
        elif size < 1 << 16:
            end = _BIN_16(flags, 0xC5, size)
        else:
            end = _BIN_32(flags, 0xC6, size)
        if seq < 1 << 7:
            number = _FIXINT(seq)
        elif seq < 1 << 8:
            number = _UINT_8(0xCC, seq)
        elif seq < 1 << 16:
            number = _UINT_16(0xCD, seq)
        else:
            number = _UINT_32(0xCE, seq)
        return self._prefix + number + end + data


# msgpack's headers: small integers, and an integer (the flags, below 128) with the header of binary data.
_FIXINT, _UINT_8, _UINT_16, _UINT_32 = (Struct(form).pack for form in (">B", ">BB", ">BH", ">BI"))
_BIN_8, _BIN_16, _BIN_32 = (Struct(form).pack for form in (">BBB", ">BBH", ">BBI"))

_FIELDS = (str, int, str, int, int, bytes, int, str, dict)
_TYPES = {length: _FIELDS[:length] for length in (6, 8, 9)}


def unpack_frames(data: bytes) -> list[Frame]:
    """The frames packed in ``data``. Raises ``BadMessage`` if any is malformed."""
    frames = []
    for fields in codec.decode_all(data):
        if type(fields) is not list or len(fields) not in (6, 8, 9):
            raise BadMessage("a frame is an array of 6, 8 or 9 fields")
        if tuple(map(type, fields)) != _TYPES[len(fields)]:
            raise _wrong_type(fields)
        if bool(fields[4] & HEAD) != (len(fields) >= 8):
            raise BadMessage("a frame carries status and content type exactly with HEAD")
        if fields[4] & HEAD and not 200 <= fields[6] <= 599:
            raise BadMessage(f"a frame's status is {fields[6]}; an answer has 200 to 599")
        if len(fields) == 9:
            fields[8] = http_headers.read_headers(fields[8], http_headers.CLIENT_HEADERS, http_headers.MAX_ANSWER_BYTES)
        frames.append(Frame(*fields))
    return frames


def _wrong_type(fields: list[Any]) -> BadMessage:
    found, expected = next(
        (type(value), expected) for value, expected in zip(fields, _FIELDS, strict=False) if type(value) is not expected
    )
    return BadMessage(f"a frame field is {found.__name__}, not {expected.__name__}")


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Consecutive frames of one attempt. ``starts_answer``: the first one starts the answer, rather than continuing
    the output of an earlier attempt."""

    first_seq: int = 0
    frames: tuple[bytes, ...] = ()
    starts_answer: bool = False


def split_frames(data: bytes) -> FrameRun:
    """The packed frames of one attempt in ``data``, each packed separately."""
    frames = unpack_frames(data)
    if not frames:
        return FrameRun()
    first = frames[0]
    return FrameRun(
        first.seq,
        tuple(frame.pack() for frame in frames),
        starts_answer=bool(first.flags & HEAD and not first.flags & CONTINUED),
    )


class MarkerKind(StrEnum):
    """What happened to a job or its attempt."""

    REQUEUED = "requeued"
    """The attempt ended unsettled; the job waits again under a higher epoch."""
    LOST = "lost"
    """The same for a stream to be continued: it waits until its Router says what was delivered (``resume``)."""
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@record
class Marker:
    """An event of a job other than a frame of its answer. ``epoch`` is the job's epoch after the event."""

    kind: MarkerKind
    job_id: JobId
    epoch: int
    reason: str

    def pack(self) -> bytes:
        """``kind job_id epoch reason``: the reason is the rest of the text."""
        return f"{self.kind} {self.job_id} {self.epoch} {self.reason}".encode()


def unpack_marker(data: bytes) -> Marker:
    """The marker in ``data``, or ``BadMessage``."""
    try:
        kind, job_id, epoch, reason = data.decode("utf-8", "replace").split(" ", 3)
        return Marker(MarkerKind(kind), JobId(job_id), int(epoch), reason)
    except ValueError as error:
        raise BadMessage(f"not a marker: {data[:100]!r}") from error
