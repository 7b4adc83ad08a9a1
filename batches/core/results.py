"""Build the lines of the output and error files, and pack them into the chunks that hold them until the batch ends.

A chunk is one line of JSON, ``{"lines", "sizes", "ok", "usage"}``, lists of the same length, followed by the lines
themselves. It is written once. A line may be in two chunks: the first one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

USAGE = ("input_tokens", "output_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
_NO_USAGE = (0,) * len(USAGE)
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
"""Characters at which Python's ``splitlines``, and with it the SDK's ``iter_lines``, would split a line."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a line: ``text`` is a line of the output file (``ok``) or of the error file, newline included.
    ``usage`` is in the order of :data:`USAGE`."""

    line: int
    ok: bool
    text: bytes
    usage: tuple[int, ...] = _NO_USAGE


def answered(line: int, request_id: str, custom_id: str, status: int, content_type: str, body: bytes) -> Result:
    """The result of an engine's answer: its body byte for byte if it is JSON, else as text."""
    parsed: Any
    try:
        parsed = orjson.loads(body)
        shown: Any = parsed if b"\n" in body or b"\r" in body else orjson.Fragment(body)
    except orjson.JSONDecodeError:
        parsed, shown = None, body.decode("utf-8", "replace")
    ok = 200 <= status < 300
    response = {"status_code": status, "request_id": request_id, "body": shown}
    if parsed is None and ok and not content_type.startswith("application/json"):
        response["content_type"] = content_type
    text = _line(request_id, custom_id, response, None)
    return Result(line, ok, text, usage_of(parsed) if ok else _NO_USAGE)


def unanswered(line: int, request_id: str, custom_id: str, code: str, message: str) -> Result:
    """The result of a line that no engine answered."""
    return Result(line, False, _line(request_id, custom_id, None, {"code": code, "message": message}))


def _line(request_id: str, custom_id: str, response: Any, error: Any) -> bytes:
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    for sign, escaped in _LINE_ENDS:
        text = text.replace(sign, escaped)
    return text


def usage_of(answer: Any) -> tuple[int, ...]:
    """The token counts of an answer, with the field names of either API."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return _NO_USAGE
    read = _number(usage, "input_tokens", "prompt_tokens")
    written = _number(usage, "output_tokens", "completion_tokens")
    cached = _detail(usage, ("input_tokens_details", "prompt_tokens_details"), "cached_tokens")
    thought = _detail(usage, ("output_tokens_details", "completion_tokens_details"), "reasoning_tokens")
    return (read, written, _number(usage, "total_tokens") or read + written, cached, thought)


def _number(usage: dict[str, Any], *names: str) -> int:
    for name in names:
        if type(value := usage.get(name)) is int and 0 <= value < 2**53:
            return value
    return 0


def _detail(usage: dict[str, Any], places: Sequence[str], name: str) -> int:
    for place in places:
        if isinstance(details := usage.get(place), dict):
            return _number(details, name)
    return 0


def pack_chunk(results: Sequence[Result]) -> bytes:
    """The chunk of these results."""
    header = {
        "lines": [result.line for result in results],
        "sizes": [len(result.text) for result in results],
        "ok": [result.ok for result in results],
        "usage": [result.usage if any(result.usage) else [] for result in results],
    }
    return b"".join((orjson.dumps(header, option=orjson.OPT_APPEND_NEWLINE), *(result.text for result in results)))


def unpack_chunk(data: bytes) -> list[Result]:
    """The results of a chunk. Raises ``ValueError`` if it is incomplete."""
    head, found, rest = data.partition(b"\n")
    if not found:
        raise ValueError("a chunk begins with its header")
    header = orjson.loads(head)
    results = []
    at = 0
    for line, size, ok, usage in zip(header["lines"], header["sizes"], header["ok"], header["usage"], strict=True):
        results.append(Result(line, ok, rest[at : at + size], tuple(usage) or _NO_USAGE))
        at += size
    if at != len(rest):
        raise ValueError(f"the chunk has {len(rest)} bytes, and its header says {at}")
    return results
