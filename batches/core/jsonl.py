"""Split the input file of a batch into lines, and validate each.

The format is OpenAI's (Batch API, 2026-08): UTF-8, one JSON object a line, ``{"custom_id", "method", "url", "body"}``.
Blank lines and a byte order mark at the beginning are skipped. Error codes are OpenAI's where it has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from openai_api.completions.continuable import keeps_numbers, may_yield
from openai_api.json_complexity import TOO_MUCH, has_too_much_structure
from openai_api.request_limits import RequestLimits, check_request
from queue_schemas import BadMessage, BadRequest
from queue_schemas.ids import check_name
from scheduling.affinity import prefix_digests
from scheduling.cost import estimate_cost

MAX_CUSTOM_ID = 512
_BOM = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")

_DEEP = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]')
_TOP = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}:,]')
"""Tokens that show where a JSON value ends: strings and brackets; at the top level of the line also ``:`` and ``,``."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that is not blank, without its newline. ``number`` counts from 1, blank lines included; ``offset`` and
    ``end`` are the bytes at which it and the next line begin. ``data`` is None if the line is too long."""

    number: int
    offset: int
    end: int
    data: bytes | None


class LineSplitter:
    """Splits a file, fed in pieces, into lines. It holds at most one line, and nothing of one that is too long.

    ``number`` and ``offset`` are those of the next line: a splitter made with them continues there.
    """

    def __init__(self, max_bytes: int, *, number: int = 1, offset: int = 0) -> None:
        self.number = number
        self.offset = offset
        self._max_bytes = max_bytes
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._too_long = False

    def feed(self, piece: bytes) -> Iterator[RawLine]:
        """The lines that end in ``piece``. Exhaust it before the next call."""
        start = 0
        while (at := piece.find(b"\n", start)) >= 0:
            self._hold(piece[start:at])
            yield from self._cut(1)
            start = at + 1
        if start < len(piece):
            self._hold(piece[start:])

    def end(self) -> Iterator[RawLine]:
        """The last line, if the file does not end with a newline."""
        if self._held_bytes:
            yield from self._cut(0)

    def _hold(self, part: bytes) -> None:
        self._held_bytes += len(part)
        self._too_long = self._too_long or self._held_bytes > self._max_bytes
        if self._too_long:
            self._held.clear()
        elif part:
            self._held.append(part)

    def _cut(self, end_bytes: int) -> Iterator[RawLine]:
        number, offset = self.number, self.offset
        data = None if self._too_long else b"".join(self._held).strip()
        self.number, self.offset = number + 1, offset + self._held_bytes + end_bytes
        self._held, self._held_bytes, self._too_long = [], 0, False
        if number == 1 and data is not None:
            data = data.removeprefix(_BOM)
        if data is None or data:
            yield RawLine(number, offset, self.offset, data)


class BadLine(Exception):
    """Why a line is invalid: the fields of the API's error object."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A valid line. ``body`` is sent to the engine."""

    custom_id: str
    model: str
    body: dict[str, Any]


def read_line(data: bytes | None, endpoint: str, max_bytes: int, limits: RequestLimits | None = None) -> BatchLine:
    """Parse and validate a line of a batch for ``endpoint``. Raises :class:`BadLine`, also for a request that exceeds
    ``limits``."""
    if data is None:
        raise BadLine("line_too_long", f"the line is longer than {max_bytes} bytes; shorten it, or split the request")
    line = _parsed(data)
    custom_id = _text(line, "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID:
        raise BadLine(
            "invalid_custom_id",
            f"custom_id has more than {MAX_CUSTOM_ID} characters; give a shorter one",
            "custom_id",
        )
    method = _text(line, "method")
    if method != "POST":
        raise BadLine("invalid_method", f"method must be POST, not {method[:40]!r}", "method")
    url = _text(line, "url")
    if url != endpoint:
        raise BadLine("invalid_url", f"url must be the batch's endpoint {endpoint}, not {url[:200]!r}", "url")
    body = _required(line, "body")
    if type(body) is not dict:
        raise BadLine("invalid_type", f"body must be a JSON object, not {_json_type(body)}", "body")
    if body.get("stream"):
        raise BadLine("unsupported_parameter", "a batch line cannot be streamed: remove stream", "body.stream")
    model = _text(body, "model", "body.model")
    try:
        check_name(model, "model")
    except BadMessage as error:
        raise BadLine("model_not_found", error.message, "body.model") from None
    if limits is not None:
        try:
            check_request(body, endpoint, limits)
        except BadRequest as error:
            raise BadLine("invalid_request", error.message, f"body.{error.param}") from None
    return BatchLine(custom_id, model, body)


class LineRequest(NamedTuple):
    """What is sent of a line: its ``custom_id``, the body for the engine, what that will cost, by an estimate, the
    digests of its prefix, and whether it may be interrupted and go on behind what it said."""

    custom_id: str
    body: bytes
    cost: int
    affinity: str = ""
    may_yield: bool = False


def request_in(data: bytes, tenant: str, model: str) -> LineRequest:
    """The request of a line that is known to be valid, unchanged in meaning."""
    line = orjson.loads(data)
    request, url = line["body"], line.get("url", "")
    body = _body_of(request, data)
    yieldable = may_yield(url, request) and keeps_numbers(data)  # its request is written anew as a stream's
    affinity = prefix_digests(tenant, model, request)
    return LineRequest(line["custom_id"], body, estimate_cost(url, body, request), affinity, yieldable)


def _body_of(body: object, data: bytes) -> bytes:
    if keeps_numbers(data):
        try:
            return orjson.dumps(body)
        except orjson.JSONEncodeError:
            pass  # orjson writes less deeply nested values than it reads
    return _cut_body(data)


def _cut_body(data: bytes) -> bytes:
    """The body byte for byte. Slower. Of several fields ``body`` the last one counts, as for JSON parsers."""
    depth = at = begin = 0
    key = body = b""
    while token := (_TOP if depth == 1 else _DEEP).search(data, at):
        mark, at = token[0][:1], token.end()
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 1 and mark == b'"' and not begin:
            key = token[0]
        elif depth == 1 and mark == b":":
            begin = at
        elif begin and (depth == 0 or (depth == 1 and mark == b",")):
            body = data[begin : token.start()].strip() if orjson.loads(key) == "body" else body
            begin = 0
    return body


def _parsed(data: bytes) -> dict[str, Any]:
    if data.startswith(_WIDE_MARKS) or data[:4].count(0):
        raise BadLine("invalid_encoding", "the file is UTF-16 or UTF-32; save it as UTF-8 and upload it again")
    if has_too_much_structure(data):
        raise BadLine("invalid_json_line", f"the line has {TOO_MUCH}; split the request")
    try:
        line = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            data.decode()
        except UnicodeDecodeError as wrong:
            raise BadLine(
                "invalid_encoding", f"the line is not UTF-8 (byte {wrong.start + 1} of it); save the file as UTF-8"
            ) from None
        raise BadLine("invalid_json_line", f"the line is not valid JSON: {error.msg} (column {error.colno})") from None
    if type(line) is not dict:
        raise BadLine("invalid_json_line", f"the line must be a JSON object, not {_json_type(line)}")
    return line


def _required(line: dict[str, Any], name: str, param: str = "") -> Any:
    if line.get(name) is None:
        raise BadLine("missing_required_parameter", f"{param or name} is missing", param or name)
    return line[name]


def _text(line: dict[str, Any], name: str, param: str = "") -> str:
    value = _required(line, name, param)
    if type(value) is not str:
        raise BadLine("invalid_type", f"{param or name} must be text, not {_json_type(value)}", param or name)
    if not value:
        raise BadLine("missing_required_parameter", f"{param or name} is empty", param or name)
    return value


def _json_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return names.get(type(value), "null")
