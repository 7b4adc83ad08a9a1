"""Reading requests: which paths pass, and what is read of a body."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_api.paths import INFERENCE_PATHS, known_paths
from queue_schemas import BadRequest
from router.inference.request_fields import read_fields


def form(*parts: tuple[str, bytes], boundary: str = "B", end: str = "--B--") -> bytes:
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + data + b"\r\n"
        for name, data in parts
    )
    return body + end.encode() + b"\r\n"


CHAT = "/v1/chat/completions"
FORM = "multipart/form-data; boundary=B"


def test_fields_are_read_from_json() -> None:
    """Model, stream and priority; null means the default."""
    fields = read_fields(b'{"model": "a/b:c", "stream": true, "priority": 3}', "application/json", CHAT)
    assert (fields.model, fields.stream, fields.priority) == ("a/b:c", True, 3)
    fields = read_fields(b'{"model": "m", "stream": null, "priority": null, "new": [1]}', "", CHAT)
    assert (fields.model, fields.stream, fields.priority) == ("m", False, 0)


@pytest.mark.parametrize("stream", ["", ', "stream": true'])
def test_only_a_response_can_be_background(stream: str) -> None:
    """The field means something on one path; elsewhere an engine may define one with that name."""
    for word, expected in (("true", True), ("false", False), ("null", False)):
        body = f'{{"model": "m", "background": {word}{stream}}}'.encode()
        assert read_fields(body, "", "/v1/responses").background is expected
        assert not read_fields(body, "", CHAT).background
    assert not read_fields(b'{"model": "m", "background": 3}', "", CHAT).background
    with pytest.raises(BadRequest, match="background must be true or false, not a number"):
        read_fields(b'{"model": "m", "background": 3}', "", "/v1/responses")


@pytest.mark.parametrize("extra", ["v1/x", "/v1//x", "/v1/../x", "/v1/x/", "/v1/%78", "/", "/v1/x?y"])
def test_extra_paths_must_be_plain(extra: str) -> None:
    """A setting cannot open a path in a spelling that hides another."""
    with pytest.raises(ValueError, match=r"path"):
        known_paths([extra])


def test_extra_paths_add_to_the_built_in_ones() -> None:
    """An operator can let further inference paths through."""
    assert known_paths(["/v1/classify"]) == {*INFERENCE_PATHS, "/v1/classify"}


def test_a_quoted_boundary_and_a_preamble_are_understood() -> None:
    """What RFC 2046 allows around the first boundary does not hide the fields."""
    body = b"to be ignored\r\n" + form(("name=model", b"m"), boundary="x y", end="--x y--")
    assert read_fields(body, 'Multipart/Form-Data; charset=utf-8; boundary="x y"', CHAT).model == "m"


def test_a_file_called_model_is_not_the_model() -> None:
    """Only a text field names the model, whatever files are called."""
    body = form(('name="model"; filename="model"', b"file"), ('filename="a"; name="f"', b"x"), ('name="model"', b"m"))
    assert read_fields(body, FORM, CHAT).model == "m"


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (form(('name="file"', b"x")), FORM, "model is missing"),
        (form(('name="model"', b"a"), ('name="model"', b"b")), FORM, "twice"),
        (form(('name="model"', b"m"), ('name="stream"', b"maybe")), FORM, "true or false"),
        (form(('name="model"', b"m"), ('name="priority"', b"high")), FORM, "whole number"),
        (form(('name="model"', b"m"), ('name="timeout"', b"soon")), FORM, "timeout must be a number of seconds"),
        (form(('name="model"', b"m"), ('name="timeout"', b"nan")), FORM, "timeout must be a number of seconds"),
        (form(('name="model"', b"m" * 2000)), FORM, "longer than"),
        (form(('name="model"', b"\xff")), FORM, "UTF-8"),
        (form(('name="model"', b"m"))[:-8], FORM, "cut short"),
        (b"--B\r\nContent-Disposition: form-data", FORM, "cut short"),
        (b"nothing here", FORM, "does not contain the boundary"),
        (form(('name="model"', b"m")), "multipart/form-data", "needs a boundary"),
        (form(*[('name="x"', b"")] * 200), FORM, "more than 128 parts"),
    ],
)
def test_a_malformed_form_is_refused_with_its_fault(body: bytes, kind: str, words: str) -> None:
    """Every fault of a form has its own sentence."""
    with pytest.raises(BadRequest, match=words):
        read_fields(body, kind, CHAT)


@given(st.binary(max_size=200))
def test_no_body_crashes_the_reader(body: bytes) -> None:
    """Any body is read or refused."""
    for kind in ("application/json", FORM):
        try:
            read_fields(body, kind, CHAT)
        except BadRequest:
            continue


@given(st.binary(max_size=200).filter(lambda data: b"--B" not in data))
def test_file_contents_never_hide_a_field(data: bytes) -> None:
    """A file of any bytes before the model does not keep it from being found."""
    body = form(('name="file"; filename="f"', data), ('name="model"', b"m"))
    assert read_fields(body, FORM, CHAT).model == "m"


def test_a_body_that_is_all_structure_is_refused_before_it_is_parsed() -> None:
    """Millions of empty objects would cost a gibibyte and seconds to parse; text of the same size costs nothing."""
    bomb = b'{"model":"m","x":[' + b"{}," * 1_000_000 + b"{}]}"
    with pytest.raises(BadRequest, match="objects, lists and names"):
        read_fields(bomb, "application/json", CHAT)
    text = b'{"model":"m","x":"' + b"word, " * 1_000_000 + b'"}'
    assert read_fields(text, "application/json", CHAT).model == "m"


@pytest.mark.parametrize(
    ("item", "times", "within"),
    [
        (b'"k" :1,', 1_100_000, b'{%b"k":1}'),
        (b'"k"\n:1,', 1_100_000, b'{%b"k":1}'),
        (b'"",', 1_100_000, b'[%b""]'),
        (rb'"\\",', 2_100_000, b'[%b""]'),
        (b"1,", 4_100_000, b"[%b1]"),
        (b"null,", 4_100_000, b"[%b1]"),
    ],
    ids=["names before a blank", "names before a line end", "empty texts", "backslashes", "numbers", "nulls"],
)
def test_structure_is_counted_however_it_is_written(item: bytes, times: int, within: bytes) -> None:
    """[H21] A body of millions of names, texts or numbers is refused before it is parsed, whatever stands between
    them."""
    with pytest.raises(BadRequest, match="objects, lists and names"):
        read_fields(b'{"model":"m","x":%b}' % (within % (item * times)), "application/json", CHAT)


def test_ordinary_prompts_are_not_counted_as_structure() -> None:
    """[H21] Prompts of many token ids, source code with escaped quotes, and long prose with commas pass."""
    ids = b"[" + b",".join([b"12"] * 1_100_000) + b"]"
    code = b'"' + rb"\"a\"," * 1_100_000 + b'"'
    prose = b'"' + b"so, " * 1_100_000 + b'"'
    for prompt in (ids, code, prose):
        body = b'{"model":"m","prompt":' + prompt + b"}"
        assert read_fields(body, "application/json", "/v1/completions").model == "m"
