"""Reads the conditional and range headers of a download (RFC 9110) and names the file for browsers (RFC 6266). Pure."""

from __future__ import annotations

import re
from urllib.parse import quote

from queue_schemas import RangeNotSatisfiable

_ONE_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9 ._+()-]+")


def read_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last that the header asks for; None: all of ``size`` bytes.

    Several ranges, other units and what is no range at all are ignored, as the standard allows. Raises
    ``RangeNotSatisfiable`` for a range behind the end.
    """
    found = _ONE_RANGE.fullmatch(header) if header else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start = int(found[1])
        if found[2] and int(found[2]) < start:
            return None
        end = min(size, int(found[2]) + 1) if found[2] else size
    if start >= end:
        raise RangeNotSatisfiable(f"the file has {size} bytes: ask for a range within them")
    return start, end


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether ``If-None-Match`` names ``etag``."""
    if header is None:
        return False
    return any(given.strip().removeprefix("W/") in {etag, "*"} for given in header.split(","))


def content_disposition(filename: str) -> str:
    """A ``content-disposition`` under which any browser saves the file by its name (RFC 6266)."""
    if _PLAIN.fullmatch(filename):
        return f'attachment; filename="{filename}"'
    plain = "".join(character if _PLAIN.fullmatch(character) else "_" for character in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
