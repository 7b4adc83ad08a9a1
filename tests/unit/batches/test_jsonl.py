"""Lines of an input file: how it is cut, and what each fault is called."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches.core import BadLine, LineSplitter, RawLine, read_line, request_in
from openai_api.request_limits import RequestLimits
from scheduling.affinity import prefix_digests

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m"}}


def cut(pieces: list[bytes], max_bytes: int = 100) -> list[RawLine]:
    cutter = LineSplitter(max_bytes)
    return [raw for piece in pieces for raw in cutter.feed(piece)] + list(cutter.end())


@given(st.lists(st.binary(max_size=20).map(lambda part: part.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_are_those_of_the_file_wherever_its_pieces_end(parts: list[bytes], data: st.DataObject) -> None:
    """Numbers and offsets name the same lines however the file arrives, and a cutter goes on from any of them."""
    text = b"\n".join(parts)
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    found = cut(pieces)
    for raw in found:
        assert text[raw.offset : raw.end].strip().removeprefix(b"\xef\xbb\xbf" if raw.number == 1 else b"") == raw.data
        assert text[: raw.offset].count(b"\n") == raw.number - 1
        again = LineSplitter(100, number=raw.number, offset=raw.offset)
        assert next(iter([*again.feed(text[raw.offset :]), *again.end()])) == raw
    assert [raw.number for raw in found] == [n for n, part in enumerate(parts, 1) if part.strip()]


def test_a_line_that_is_too_long_is_not_held() -> None:
    """It is told by its number, and the lines behind it are read on."""
    found = cut([b"x" * 60, b"x" * 60 + b"\nok\n"])
    assert [(raw.number, raw.data) for raw in found] == [(1, None), (2, b"ok")]
    with pytest.raises(BadLine, match="longer than 100 bytes") as told:
        read_line(None, CHAT, 100)
    assert told.value.code == "line_too_long"


def test_windows_line_ends_blank_lines_and_a_mark_at_the_beginning_pass() -> None:
    """What editors add is no fault."""
    text = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode()
    found = cut([text], 200)
    assert [raw.number for raw in found] == [1, 4]
    assert all(read_line(raw.data, CHAT, 200).custom_id == "a" for raw in found)


@pytest.mark.parametrize(
    ("data", "code", "param", "says"),
    [
        (b"{", "invalid_json_line", None, "not valid JSON"),
        (b"[1]", "invalid_json_line", None, "an array"),
        (b'"x"', "invalid_json_line", None, "text"),
        ("{}".encode("utf-16"), "invalid_encoding", None, "save it as UTF-8"),
        ("{}".encode("utf-16-le"), "invalid_encoding", None, "save it as UTF-8"),
        (b'{"custom_id": "\xe4"}', "invalid_encoding", None, "not UTF-8"),
        (b"[" * 1_000_001, "invalid_json_line", None, "split the request"),
        ({"custom_id": None}, "missing_required_parameter", "custom_id", "missing"),
        ({"custom_id": ""}, "missing_required_parameter", "custom_id", "empty"),
        ({"custom_id": 7}, "invalid_type", "custom_id", "text, not a number"),
        ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id", "512"),
        ({"method": "GET"}, "invalid_method", "method", "POST, not 'GET'"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url", "endpoint /v1/chat/completions"),
        ({"url": CHAT + "/../x"}, "invalid_url", "url", "endpoint"),
        ({"body": None}, "missing_required_parameter", "body", "missing"),
        ({"body": [1]}, "invalid_type", "body", "an array"),
        ({"body": {}}, "missing_required_parameter", "body.model", "body.model is missing"),
        ({"body": {"model": "m", "stream": True}}, "unsupported_parameter", "body.stream", "streamed"),
        ({"body": {"model": "m\n"}}, "model_not_found", "body.model", "printable"),
    ],
)
def test_each_fault_has_its_code_and_its_sentence(data: Any, code: str, param: str | None, says: str) -> None:
    """The vendor's words, the parameter at fault, and what to do."""
    raw = data if isinstance(data, bytes) else json.dumps(GOOD | data).encode()
    with pytest.raises(BadLine, match=says) as told:
        read_line(raw, CHAT, 1 << 24)
    assert (told.value.code, told.value.param) == (code, param)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """Whatever stands in a file is a line or a fault."""
    try:
        read_line(data, CHAT, 1 << 20)
    except BadLine as bad:
        assert bad.message


@pytest.mark.parametrize(
    "body",
    [
        b'{"seed": 18446744073709551617, "x": [-123456789012345678901234567890]}',
        b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"s": "\\"}{,:[", "body": {"body": 12345678901234567890123}}',
    ],
    ids=["long numbers", "deep", "text like structure"],
)
@pytest.mark.parametrize(
    "line",
    [
        b'{"custom_id": "a", "body": %s}',
        b'{"body" :\t%s , "custom_id": "a", "z": {"body": [{}]}, "y": "body"}',
        b'{"custom_id": "a", "b\\u006fdy": %s}',
        b'{"body": {"seed": 1}, "custom_id": "a", "body":%s}',
    ],
)
def test_a_body_means_the_same_to_its_engine(line: bytes, body: bytes) -> None:
    """What a parser would round, or could not write again, goes on as it was written."""
    assert request_in(line.replace(b"%s", body), "t", "m")[:2] == ("a", body)


def test_lines_that_begin_alike_share_digests() -> None:
    """So that a worker takes one after the other; as a request of the same tenant for the same model would."""
    lines = [f'{{"custom_id": "a", "body": {{"prompt": "{"p" * 3_000}{n}"}}}}'.encode() for n in "12"]
    first, second = (request_in(line, "acme", "m") for line in lines)
    assert first.affinity == second.affinity == prefix_digests("acme", "m", {"prompt": "p" * 3_000})
    assert request_in(lines[0], "other", "m").affinity not in ("", first.affinity)


def test_a_line_is_held_to_the_limits_of_a_request() -> None:
    """[E1] [E2] Media from anywhere and too many choices are refused in a batch as they are at once, with the field."""
    for fields, param in (
        ({"messages": [{"content": [{"image_url": {"url": "http://169.254.169.254/"}}]}]}, "body.image_url"),
        ({"n": 100_000}, "body.n"),
    ):
        line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m", **fields}}
        with pytest.raises(BadLine) as refused:
            read_line(orjson.dumps(line), CHAT, 1 << 20, RequestLimits())
        assert (refused.value.code, refused.value.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("url", "fields", "expected"),
    [
        ("/v1/chat/completions", {}, True),
        ("/v1/completions", {"prompt": "Once"}, True),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, False),
        ("/v1/chat/completions", {"stream_options": {}}, False),
        ("/v1/chat/completions", {"user": 2**70}, False),
        ("/v1/embeddings", {}, False),
    ],
)
def test_which_lines_may_yield(url: str, fields: dict[str, object], expected: bool) -> None:
    """Those whose answer can go on behind a part of it, and whose body means the same when it is written anew."""
    body = {"model": "m", **({} if "prompt" in fields else {"messages": [{"role": "user", "content": "hi"}]}), **fields}
    line = json.dumps({"custom_id": "a", "url": url, "body": body}).encode()
    assert request_in(line, "acme", "m").may_yield is expected
