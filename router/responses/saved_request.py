"""Saves a Responses request in the note of its job, and loads it, so that any Router can build the response."""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from queue_schemas import BodyTooLarge, JobId, PathNotFound
from queue_schemas.persisted_jobs import MAX_NOTE_BYTES

from .json_fields import Json
from .schemas import ResponseRequest

_COMPRESSION_LEVEL = 1
"""JSON and text shrink to a third, in very little time."""
_MAX_UNCOMPRESSED_BYTES = 8 * MAX_NOTE_BYTES
"""Larger notes would not fit when compressed either."""


def save_request(created_at: int, request: Json) -> bytes:
    """The note for ``request``. An input that does not fit is left out: the job itself asks it, it only cannot be
    listed later. Raises ``BodyTooLarge`` if the rest does not fit either."""
    without_input = {name: value for name, value in request.items() if name != "input"}
    for saved in (request, without_input):
        note = orjson.dumps({"created_at": created_at, "request": saved})
        if (
            len(note) <= _MAX_UNCOMPRESSED_BYTES
            and len(packed := zlib.compress(note, _COMPRESSION_LEVEL)) <= MAX_NOTE_BYTES
        ):
            return packed
    raise BodyTooLarge(
        f"instructions, tools and text.format of a background response may have {MAX_NOTE_BYTES} bytes together, "
        "compressed: send long texts as input"
    )


def load_request(job_id: JobId, note: bytes) -> ResponseRequest:
    """The request that was saved. Raises ``PathNotFound`` for a note that is no response's."""
    try:
        fields: Any = orjson.loads(zlib.decompress(note))
        return ResponseRequest(job_id, int(fields["created_at"]), dict(fields["request"]))
    except (zlib.error, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise PathNotFound(f"there is no response of the job {job_id}") from None
