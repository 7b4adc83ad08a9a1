"""Gives the events of a stream ids, so that a client that lost its connection continues behind the last one it has.

An event's id is its number, counted from 1, and the CRC-32 of the stream up to its end: ``17-9f3a2b1c``. A client that
sends it gets what follows only if the stream up to there is the one it had. A stream that was restarted since (its
worker was lost, or the queue's latest writes) may differ, and two different streams are never spliced. A bare number is
not checked. The ``id`` line is the last of its event (WHATWG HTML, 9.2: fields may stand in any order).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from openai_api.errors import Dialect
from openai_api.event_normalizer import EventNormalizer
from queue_schemas import BadRequest, JobId, StreamBroken

LAST_EVENT_HEADER = "last-event-id"
_POSITION = re.compile(r"(?:((?:0|[1-9][0-9]{0,3})-[0-9a-f]{32}):)?([0-9]{1,15})(?:-([0-9a-f]{8}))?")


@dataclass(frozen=True, slots=True)
class Position:
    """The last event that a client has. ``job_id`` is None if the id names no job. ``check`` is the CRC-32 of the
    stream up to there, empty for a bare number."""

    number: int = 0
    check: str = ""
    job_id: JobId | None = None


def find_position(value: str) -> Position | None:
    """The position that an event's id names; None if ``value`` is not such an id."""
    match = _POSITION.fullmatch(value.strip())
    if match is None:
        return None
    return Position(int(match[2]), match[3] or "", JobId(match[1]) if match[1] else None)


def read_position(value: str, param: str) -> Position:
    """The same for a request that has to name one. Raises ``BadRequest`` that names ``param``."""
    position = find_position(value)
    if position is None:
        raise BadRequest(f"{param} must be the id of an event, as the stream gave it, or its number", param=param)
    return position


class EventNumbers(EventNormalizer):
    """Adds ids to the events of one stream, and leaves out those up to ``after``, which the client has.

    Feed it the stream as it comes; pieces may end anywhere. Raises ``StreamBroken`` if the stream is not the one of
    which the client had the beginning. Only events with data have numbers; an engine's own ids are replaced.
    """

    __slots__ = ("_after", "_crc", "_prefix", "number")

    def __init__(
        self,
        after: Position | None = None,
        prefix: str = "",
        dialect: Dialect = Dialect.OPENAI,
        request_id: str = "",
    ) -> None:
        """``prefix`` stands before every id."""
        super().__init__(dialect, request_id)
        self.number = 0
        """Events so far, those left out included."""
        self._after = after or Position()
        self._prefix = prefix.encode()
        self._crc = 0

    def finish(self) -> bytes:
        """End the stream. Returns what was held back of it."""
        rest = super().finish()
        if self.number < self._after.number:
            raise StreamBroken(
                f"the stream has {self.number} events, not {self._after.number}: it is not the one that you had the "
                "beginning of; read it from its beginning"
            )
        return rest

    def _passes(self, data: bytes) -> bool:
        return False

    def _seen(self, data: bytes) -> None:
        self._crc = crc32(data, self._crc)

    def _already_sent(self) -> bool:
        return self.number < self._after.number

    def _number(self) -> bytes | None:
        self.number += 1
        if self.number > self._after.number:
            return b"id: %b%d-%08x\n" % (self._prefix, self.number, self._crc)
        if self.number == self._after.number:
            self._check()
        return None

    def _kept(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        return [line for line in lines if not line.startswith(b"id:")]

    def _check(self) -> None:
        if self._after.check and int(self._after.check, 16) != self._crc:
            raise StreamBroken(
                "the stream cannot continue where you stopped: it was restarted, and differs up to there; read it "
                "from its beginning"
            )
