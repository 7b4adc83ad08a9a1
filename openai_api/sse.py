"""Build and split server-sent events (WHATWG HTML, 9.2): an event from its data, the events of a stream, their data.

For every role that writes or reads an event stream. Events are built with LF line ends; streams may end lines with LF
or CRLF, and :mod:`worker.core.frames` turns a bare CR into LF first.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

EVENT_STREAM = "text/event-stream"
"""The content type of an event stream."""
DONE = b"[DONE]"
"""The data of the last event of a stream of chat or text completions."""
DONE_EVENT = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 1 << 20
"""Workers and Routers hold an event back until it is complete; a longer one is passed on in pieces."""
_LINE_END = re.compile(rb"[\r\n]")
_FIELD = re.compile(rb"^(?:\xef\xbb\xbf)?(?::|data|event|id|retry)", re.MULTILINE)


def encode_event(data: bytes, name: str = "") -> bytes:
    """One event with each line of ``data``; without a ``name``, it has no ``event`` field."""
    field = b"event: %b\n" % name.encode() if name else b""
    if _LINE_END.search(data):
        return field + b"".join(b"data: %b\n" % line for line in data.splitlines()) + b"\n"
    return b"%bdata: %b\n\n" % (field, data)


def encode_json(value: Any, name: str = "") -> bytes:
    """One event whose data is ``value`` as JSON."""
    return encode_event(orjson.dumps(value), name)


def end_of_events(data: bytes, known: int = 0) -> int:
    """The index behind the last blank line of ``data`` (LF LF or CRLF CRLF); 0 if there is none.

    The first ``known`` bytes are known to hold none; one may begin in the last three of them.
    """
    start = max(known - 3, 0)
    lf = data.rfind(b"\n\n", start)
    crlf = data.rfind(b"\r\n\r\n", start)
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def split_events(stream: bytes) -> list[bytes]:
    """The events of ``stream``, each with the blank line that ends it, with LF line ends."""
    return [event + b"\n\n" for event in stream.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip()]


def event_data(event: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    return b"\n".join(field_value(line) for line in event.splitlines() if line.startswith(b"data:")).strip()


def field_value(line: bytes) -> bytes:
    """The value in one line of an event, without the space that may follow the colon."""
    return line.partition(b":")[2].removeprefix(b" ")


def has_event_field(body: bytes) -> bool:
    """Whether ``body`` has a line of an event, whatever its content type says."""
    return _FIELD.search(body) is not None
