"""Normalise an engine's event stream, for the Router, to the form that every SDK decodes alike.

Engines send what the standard allows and SDKs fail on (WHATWG HTML, 9.2): comments, ``retry`` lines or blank lines by
themselves, events without data, CR LF, errors where the API's clients do not look. :class:`EventNormalizer` passes on
plain events untouched and rewrites the rest:

* Only an event with data ends in a blank line. A comment or a ``retry`` line by itself becomes a line before the next
  event; an event without data is dropped. The standard ignores both, openai for Python and Node do not.
* Lines end in LF, and the last event has its blank line.
* An error has the shape of the API's dialect (:mod:`openai_api.errors`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .engine_errors import shaped_event
from .errors import Dialect
from .sse import field_value, has_event_field

MAX_HELD_BYTES = 64 * 1024
"""So much of an event waits for its end; a longer one is passed on in pieces, as it is."""
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n")
_PLAIN = re.compile(rb'(?:(?:event: ?[^\r\n]+\n)?data: ?[\[{"][^\r\n]*\n\n)*')
_BOM = b"\xef\xbb\xbf"


class EventNormalizer:
    """Normalises the events of one answer. Pieces of the stream may end anywhere; whole events are fastest.

    ``inside``: a part of a long event was returned, and only its rest may follow. ``last``: what was returned last."""

    __slots__ = ("_begun", "_dialect", "_held", "_request_id", "inside", "last")

    def __init__(self, dialect: Dialect = Dialect.OPENAI, request_id: str = "") -> None:
        self.inside = False
        self.last = b""
        self._dialect = dialect
        self._request_id = request_id
        self._held = b""
        self._begun = False

    def feed(self, data: bytes) -> bytes:
        """What may be sent of ``data`` now."""
        if self._held or self.inside or not self._passes(data):
            data = self._cut(self._held + data)
        self.last = data or self.last
        return data

    def finish(self) -> bytes:
        """The stream is over: what is left of it. A body without one line of an event passes as it is."""
        held, self._held = self._held, b""
        if not self._begun and not self.inside and not has_event_field(held):
            return held
        return self._normalize(held + b"\n\n") if held or self.inside else b""

    def _passes(self, data: bytes) -> bool:
        """Whether ``data`` is whole events in the plainest form."""
        return b'"error"' not in data and _PLAIN.fullmatch(data) is not None

    def _cut(self, data: bytes) -> bytes:
        out: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(data):
            out.append(self._normalize(data[start : blank.end()]))
            start = blank.end()
        rest = data[start:]
        if self.inside or len(rest) > MAX_HELD_BYTES:
            kept = len(rest.rstrip(b"\r\n"))  # what may be the half of a blank line waits for the other half
            if kept:
                out.append(self._piece(rest[:kept]))
                rest = rest[kept:]
        self._held = rest
        return b"".join(out)

    def _normalize(self, data: bytes) -> bytes:
        """Bytes up to a blank line. There may be blank lines of mixed line ends in them, too."""
        self._seen(data)
        if self.inside:
            self.inside = False
            number = self._number()
            return b"" if number is None else data.rstrip(b"\r\n") + b"\n" + number + b"\n"
        if not self._begun:
            self._begun = True
            data = data.removeprefix(_BOM)
        out: list[bytes] = []
        lines: list[bytes] = []
        for line in (*data.splitlines(), b""):
            if line:
                lines.append(line)
            elif lines:
                out.append(self._event(lines))
                lines = []
        return b"".join(out)

    def _piece(self, data: bytes) -> bytes:
        """A part of an event that is too long to wait for."""
        self._seen(data)
        self.inside = True
        return b"" if self._already_sent() else data

    def _event(self, lines: Sequence[bytes]) -> bytes:
        data = [field_value(line) for line in lines if line.startswith(b"data:")]
        if not any(value.strip() for value in data):
            quiet = [line + b"\n" for line in lines if line.startswith((b":", b"retry:"))]
            return b"" if self._already_sent() else b"".join(quiet)
        number = self._number()
        if number is None:
            return b""
        if any(b'"error"' in value for value in data):
            name = b"".join(field_value(line) for line in lines if line.startswith(b"event:"))
            shaped = shaped_event(name, b"\n".join(data), self._dialect, self._request_id)
            if shaped is not None:
                return shaped[:-1] + number + b"\n"
        return b"\n".join(self._kept(lines)) + b"\n" + number + b"\n"

    # What numbers the events (router.jobs.event_ids) does otherwise.

    def _seen(self, data: bytes) -> None:
        """``data`` was read, whether or not it is returned."""

    def _already_sent(self) -> bool:
        """Whether the reader has what stands here already."""
        return False

    def _number(self) -> bytes | None:
        """An event ends here: the line with its id, or None if the reader has it already."""
        return b""

    def _kept(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """The lines of an event that are passed on."""
        return lines
