"""Reads a few small fields of a ``multipart/form-data`` body (RFC 7578) without parsing the rest of it.

The parts are found by searching for the boundary, so a recording of many megabytes costs one search, not a parse.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from queue_schemas import BadRequest

MAX_PARTS = 128
MAX_FIELD_BYTES = 1024
_MAX_PART_HEADER_BYTES = 8 * 1024

_BOUNDARY = re.compile(r";\s*boundary=(?:\"([^\"]+)\"|([^\s;\"]+))", re.IGNORECASE)
_NAME = re.compile(rb";\s*name=(?:\"((?:[^\"\\\r\n]|\\.)*)\"|([^\s;\"]+))", re.IGNORECASE)
_FILENAME = re.compile(rb";\s*filename\*?=", re.IGNORECASE)


def boundary_of(content_type: str) -> bytes:
    """The boundary in a ``multipart/form-data`` content type, else ``BadRequest``."""
    found = _BOUNDARY.search(content_type)
    boundary = (found[1] or found[2]) if found else ""
    if not 0 < len(boundary) <= 70:
        raise BadRequest("the content type multipart/form-data needs a boundary of 1 to 70 characters")
    return boundary.encode("latin-1", "replace")


def form_fields(body: bytes, boundary: bytes, wanted: Collection[str]) -> dict[str, str]:
    """The text fields of ``body`` whose names are ``wanted``.

    Raises ``BadRequest`` for a form that is cut short, and for a wanted field given twice: two readers could choose
    differently.
    """
    fields: dict[str, str] = {}
    delimiter = b"\r\n--" + boundary
    at = len(boundary) + 2 if body.startswith(delimiter[2:]) else _after(body, delimiter, 0)
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return fields
        end_of_header = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEADER_BYTES)
        if end_of_header < 0:
            raise BadRequest("the form is cut short: a part has no end of header")
        end = body.find(delimiter, end_of_header + 2)
        if end < 0:
            raise BadRequest("the form is cut short: its last boundary is missing")
        name = _field_name(body[at:end_of_header])
        if name in wanted:
            if name in fields:
                raise BadRequest(f"the form gives {name} twice", param=name)
            fields[name] = _text(name, body, end_of_header + 4, end)
        at = end + len(delimiter)
    raise BadRequest(f"the form has more than {MAX_PARTS} parts")


def _after(body: bytes, delimiter: bytes, start: int) -> int:
    found = body.find(delimiter, start)
    if found < 0:
        raise BadRequest("the body does not contain the boundary that its content type names")
    return found + len(delimiter)


def _field_name(header: bytes) -> str:
    """The name of a text field; empty for a file and for a part without a name."""
    for line in header.split(b"\r\n"):
        if line[:20].lower() == b"content-disposition:":
            found = _NAME.search(line)
            if found and not _FILENAME.search(line):
                return (found[1] or found[2] or b"").decode("utf-8", "replace")
    return ""


def _text(name: str, body: bytes, start: int, end: int) -> str:
    if end - start > MAX_FIELD_BYTES:
        raise BadRequest(f"the form's {name} is longer than {MAX_FIELD_BYTES} bytes", param=name)
    try:
        return body[start:end].decode()
    except UnicodeDecodeError:
        raise BadRequest(f"the form's {name} is not UTF-8 text", param=name) from None
