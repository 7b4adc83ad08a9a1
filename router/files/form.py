"""Parses the form of ``POST /v1/files`` as it arrives: the file in pieces, its fields before or after it.

The parser is python-multipart's, whose callbacks are collected here; however the body is cut into pieces, what comes
out is the same.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from queue_schemas import BadRequest

from ..http.forms import MAX_FIELD_BYTES, MAX_PARTS

BATCH_PURPOSE = "batch"
PURPOSES = (BATCH_PURPOSE, "assistants", "fine-tune", "vision", "user_data", "evals")
"""What a client may upload a file for."""
MIN_LIFE_S, MAX_LIFE_S = 3_600, 2_592_000
FORM_BYTES = 128 * 1024
"""What a form may have beside its file: its fields, their headers and boundaries."""
_MAX_NAME_CHARACTERS, _MAX_NAME_BYTES = 255, 1_024
_FILE, _PURPOSE, _ANCHOR, _SECONDS = "file", "purpose", "expires_after[anchor]", "expires_after[seconds]"
_WANTED = frozenset({_PURPOSE, _ANCHOR, _SECONDS, "expires_after"})
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})


@dataclass(frozen=True, slots=True)
class FileParams:
    """The form's fields. ``life_s``: seconds until the file expires; None if the form does not say."""

    filename: str
    purpose: str
    life_s: int | None


class FileForm:
    """One form. ``feed`` its bytes, then ``finish``; both raise ``BadRequest``, which names the field at fault."""

    def __init__(self, boundary: bytes) -> None:
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_to_name,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._field = ""
        self._content = bytearray()
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._pieces: list[bytes] = []
        self._ended = False

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the file that the next bytes of the form contain."""
        try:
            if not self._ended:  # what follows the last boundary means nothing (RFC 2046)
                self._parser.write(data)
        except MultipartParseError as error:
            raise BadRequest(f"the body is not the form that its content type says: {error}") from None
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> FileParams:
        """The fields of the complete form."""
        if not self._ended:
            raise BadRequest("the form is cut short: its last boundary is missing; send it again")
        if self._filename is None:
            raise BadRequest("file is missing: send it as a part of the form with a filename", param=_FILE)
        if _PURPOSE not in self._fields:
            raise BadRequest(f"purpose is missing: give one of {', '.join(PURPOSES)}", param=_PURPOSE)
        return FileParams(self._filename, self._fields[_PURPOSE], self._life_s())

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts")
        self._headers = {}

    def _add_to_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value).strip(b" \t")
        self._header = (bytearray(), bytearray())

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        self._content = bytearray()
        if b"filename" not in options:
            if self._field == _FILE:
                raise BadRequest("file has no filename: send it as a file (curl: -F file=@prompts.jsonl)", param=_FILE)
            if self._field in self._fields:
                raise BadRequest(f"the form gives {self._field} twice", param=self._field)
            return
        if self._field != _FILE:
            shown = self._field[:40]
            raise BadRequest(f"the form has a file called {shown!r}: the one it takes is called file", param=_FILE)
        if self._filename is not None:
            raise BadRequest("the form has two files: upload each by itself", param=_FILE)
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise BadRequest("file is encoded: send its bytes as they are (content-transfer-encoding)", param=_FILE)
        self._filename = _label(options[b"filename"])

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._field == _FILE:
            self._pieces.append(data[start:end])
            return
        self._content.extend(data[start:end])
        if len(self._content) > MAX_FIELD_BYTES:
            param = self._field[:40]
            raise BadRequest(f"the form's {param} is longer than {MAX_FIELD_BYTES} bytes", param=param)

    def _end_part(self) -> None:
        if self._field not in _WANTED:
            return
        try:
            value = self._content.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"the form's {self._field} is not UTF-8 text", param=self._field) from None
        self._fields[self._field] = value
        if self._field == _PURPOSE and value not in PURPOSES:
            raise BadRequest(f"purpose must be one of {', '.join(PURPOSES)}, not {value[:40]!r}", param=_PURPOSE)

    def _end(self) -> None:
        self._ended = True

    def _life_s(self) -> int | None:
        anchor, seconds = self._fields.get(_ANCHOR), self._fields.get(_SECONDS)
        if "expires_after" in self._fields:
            raise BadRequest(f"give expires_after as two fields, {_ANCHOR} and {_SECONDS}", param="expires_after")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise BadRequest(f"{_ANCHOR} must be created_at", param=_ANCHOR)
        whole = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
        if seconds is None or not whole or not MIN_LIFE_S <= int(seconds) <= MAX_LIFE_S:
            raise BadRequest(
                f"{_SECONDS} must be a whole number from {MIN_LIFE_S} (an hour) to {MAX_LIFE_S} (30 days)",
                param=_SECONDS,
            )
        return int(seconds)


def _label(given: bytes) -> str:
    """A file's name as it is shown and given back: the last part of a path, never a place."""
    name = given[:_MAX_NAME_BYTES].decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2].strip()
    if name in {"", ".", ".."}:
        raise BadRequest("file has no filename: give it one", param=_FILE)
    if len(given) > _MAX_NAME_BYTES or len(name) > _MAX_NAME_CHARACTERS:
        raise BadRequest(f"file's name is longer than {_MAX_NAME_CHARACTERS} characters: shorten it", param=_FILE)
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        raise BadRequest("file's name has control characters: rename it", param=_FILE)
    return name
