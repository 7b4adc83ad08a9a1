"""What is kept of a Responses request beside its answer, so that any Router can build the response."""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from queue_schemas import BodyTooLarge, JobId, PathNotFound
from queue_schemas.persisted_jobs import MAX_NOTE_BYTES

from .fields import Json
from .schemas import Asked

_LEVEL = 1
"""Of compression: text, and the JSON around it, takes a third of its room at no time to speak of."""
_WORTH_TRYING = 8 * MAX_NOTE_BYTES
"""What is larger than this before it is compressed is not compressed for nothing."""


def write_note(created_at: int, request: Json) -> bytes:
    """The note of a response. An input that has no room in it is left out: it is what the job itself asks, and only
    cannot be listed again. Raises ``BodyTooLarge`` if the rest has none either."""
    without_input = {name: value for name, value in request.items() if name != "input"}
    for kept in (request, without_input):
        note = orjson.dumps({"created_at": created_at, "request": kept})
        if len(note) <= _WORTH_TRYING and len(packed := zlib.compress(note, _LEVEL)) <= MAX_NOTE_BYTES:
            return packed
    raise BodyTooLarge(
        f"instructions, tools and text.format of a background response may have {MAX_NOTE_BYTES} bytes together, "
        "compressed: send long texts as input"
    )


def read_note(job_id: JobId, note: bytes) -> Asked:
    """What was asked. Raises ``PathNotFound`` for a note that was never a response's."""
    try:
        fields: Any = orjson.loads(zlib.decompress(note))
        return Asked(job_id, int(fields["created_at"]), dict(fields["request"]))
    except (zlib.error, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise PathNotFound(f"there is no response of the job {job_id}") from None
