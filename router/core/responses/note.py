"""What is kept of a Responses request beside its answer, so that any Router can build the response."""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from queue_schemas import BodyTooLarge, JobId, PathNotFound
from queue_schemas.kept import MAX_NOTE_BYTES

from .fields import Json
from .objects import Asked

_LEVEL = 1
"""Of compression: text, and the JSON around it, takes a third of its room at no time to speak of."""


def write_note(created_at: int, request: Json) -> bytes:
    """The note of a response. An input that has no room in it is left out: it is what the job itself asks, and only
    cannot be listed again. Raises ``BodyTooLarge`` if the rest has none either."""
    note = _packed(created_at, request)
    if len(note) > MAX_NOTE_BYTES:
        note = _packed(created_at, {name: value for name, value in request.items() if name != "input"})
    if len(note) > MAX_NOTE_BYTES:
        raise BodyTooLarge(
            f"instructions, tools and text.format of a background response may have {MAX_NOTE_BYTES} bytes together, "
            "compressed: send long texts as input"
        )
    return note


def read_note(job_id: JobId, note: bytes) -> Asked:
    """What was asked. Raises ``PathNotFound`` for a note that was never a response's."""
    try:
        fields: Any = orjson.loads(zlib.decompress(note))
        return Asked(job_id, int(fields["created_at"]), dict(fields["request"]))
    except (zlib.error, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise PathNotFound(f"there is no response of the job {job_id}") from None


def _packed(created_at: int, request: Json) -> bytes:
    return zlib.compress(orjson.dumps({"created_at": created_at, "request": request}), _LEVEL)
