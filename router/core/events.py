"""Numbering the events of a stream, so that a reader who lost its connection can go on behind the last one it had.

An event's id is its number, counted from 1, and the CRC-32 of the stream up to its end: ``17-9f3a2b1c``. Whoever comes
back with it is given what follows only if the stream says the same up to there as it did to him: one that began anew
since (its worker was lost, or the queue's latest writes) may count otherwise, and nothing is spliced unseen. A bare
number is taken at its word. The ``id`` line stands last in its event (WHATWG HTML, 9.2: fields may stand in any order).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from zlib import crc32

from queue_schemas import BadRequest, JobId, StreamBroken

LAST_EVENT_HEADER = "last-event-id"
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n")
_POSITION = re.compile(r"(?:((?:0|[1-9][0-9]{0,3})-[0-9a-f]{32}):)?([0-9]{1,15})(?:-([0-9a-f]{8}))?")


@dataclass(frozen=True, slots=True)
class Position:
    """The last event that a reader has. ``job_id`` is empty if it does not say of which job, ``check`` if it does not
    say how the stream went up to there."""

    number: int = 0
    check: str = ""
    job_id: JobId | None = None


def find_position(value: str) -> Position | None:
    """The position that an event's id names; None if ``value`` is none of ours."""
    match = _POSITION.fullmatch(value.strip())
    if match is None:
        return None
    return Position(int(match[2]), match[3] or "", JobId(match[1]) if match[1] else None)


def read_position(value: str, param: str) -> Position:
    """The same, of a request that has to name one; ``BadRequest`` that names ``param`` if it does not."""
    position = find_position(value)
    if position is None:
        raise BadRequest(f"{param} must be the id of an event, as the stream gave it, or its number", param=param)
    return position


class EventNumbers:
    """Gives the events of one stream their ids, and leaves out those that its reader has.

    Feed it the stream as it comes; pieces may end anywhere. Raises ``StreamBroken`` if the stream is not the one of
    which the reader had the beginning.
    """

    __slots__ = ("_after", "_begun", "_crc", "_held", "_prefix", "number")

    def __init__(self, after: Position | None = None, prefix: str = "") -> None:
        """``prefix`` stands before every id."""
        self.number = 0
        """Events so far, those left out included."""
        self._after = after or Position()
        self._prefix = prefix.encode()
        self._crc = 0
        self._held = b""
        self._begun = False

    def feed(self, data: bytes) -> bytes:
        """What the reader lacks of ``data``, with ids."""
        data = self._held + data if self._held else data
        given: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(data):
            event, start = data[start : blank.end()], blank.end()
            self._crc = crc32(event, self._crc)
            if event.isspace() and not self._begun:
                continue
            self._begun = False
            self.number += 1
            if self.number > self._after.number:
                given += self._with_id(event)
            elif self.number == self._after.number:
                self._check()
        rest = data[start:]
        kept = len(rest.rstrip(b"\r\n"))  # what may be the half of a blank line waits for the other half
        self._held = rest[kept:]
        if kept:
            self._begun = True
            self._crc = crc32(rest[:kept], self._crc)
            if self.number >= self._after.number:
                given.append(rest[:kept])
        return b"".join(given)

    def finish(self) -> bytes:
        """The stream is over: what was held back of it."""
        if self.number < self._after.number:
            raise StreamBroken(
                f"the stream has {self.number} events, not {self._after.number}: it is not the one that you had the "
                "beginning of; read it from its beginning"
            )
        held, self._held = self._held, b""
        return held

    def _with_id(self, event: bytes) -> tuple[bytes, bytes]:
        blank = 2 if event.endswith(b"\r\n") else 1
        return event[:-blank], b"id: %b%d-%08x\n%b" % (self._prefix, self.number, self._crc, event[-blank:])

    def _check(self) -> None:
        if self._after.check and int(self._after.check, 16) != self._crc:
            raise StreamBroken(
                "the stream cannot go on where you stopped: it began anew since, and says something else up to there; "
                "read it from its beginning"
            )


def as_event(body: bytes) -> bytes:
    """``body`` as one event without an id."""
    return b"".join(b"data: %b\n" % line for line in body.splitlines() or (b"",)) + b"\n"
