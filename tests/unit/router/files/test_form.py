"""The form of an upload: the same file however it is cut, and an exact error for each thing that is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import BadRequest
from router.files.form import FileForm, FileParams

B = b"bound"
FILE = b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: application/jsonl'


def field(name: str, value: bytes) -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="%b"' % name.encode(), value


def form(*parts: tuple[bytes, bytes], end: bytes = b"--" + B + b"--\r\n") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (B, head, content) for head, content in parts) + end


def read(body: bytes, cuts: list[int] | None = None) -> tuple[bytes, FileParams]:
    """The file and what the form says of it, fed in pieces that end at ``cuts``."""
    reader, ends = FileForm(B), [*sorted(cuts or []), len(body)]
    pieces, at = [], 0
    for end in ends:
        pieces += reader.feed(body[at:end])
        at = end
    return b"".join(pieces), reader.finish()


NEARLY_BOUNDARIES = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"\r\n--boun", b"\r\n--", B, b"--bound", b"\r\n-", b"x"]), max_size=12
).map(b"".join)


@given(content=st.binary(max_size=80) | NEARLY_BOUNDARIES, data=st.data(), before=st.booleans())
def test_any_chunking_gives_the_same_file(content: bytes, data: st.DataObject, before: bool) -> None:
    """Wherever the body is cut, also within boundaries and what looks like one, what comes out is the same."""
    if b"\r\n--" + B in content or content.startswith(b"--" + B):
        return
    parts = [field("purpose", b"batch"), (FILE, content)]
    body = form(*(parts if before else reversed(parts)))
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=20))
    assert read(body, cuts) == (content, FileParams("a.jsonl", "batch", None))
    assert read(body, list(range(len(body))))[0] == content


def test_the_epilogue_and_unknown_fields_are_ignored() -> None:
    """A newer client's field is no error, nor is an epilogue."""
    body = form((FILE, b"1"), field("purpose", b"evals"), field("new", b"?")) + b"epilogue"
    assert read(body) == (b"1", FileParams("a.jsonl", "evals", None))


def test_an_expiry_is_read() -> None:
    """Both of its fields, as the SDK writes them."""
    expiry = field("expires_after[anchor]", b"created_at"), field("expires_after[seconds]", b"3600")
    assert read(form((FILE, b"1"), field("purpose", b"batch"), *expiry))[1].life_s == 3_600


@pytest.mark.parametrize(
    ("given_name", "label"),
    [
        (b"../../etc/passwd", "passwd"), (b"C:\\\\fakepath\\\\x.jsonl", "x.jsonl"),
        ("für dich.jsonl".encode(), "für dich.jsonl"), (b"\xff.jsonl", "\ufffd.jsonl"),
        (b" a ", "a"), (b'say \\"hi\\"', 'say "hi"' ), (b"...", "..."),
    ],
)  # fmt: skip
def test_a_filename_never_names_a_folder(given_name: bytes, label: str) -> None:
    """Of a path only its last part stays."""
    head = b'Content-Disposition: form-data; name="file"; filename="%b"' % given_name
    asked = read(form((head, b"1"), field("purpose", b"batch")))[1]
    assert asked.filename == label


def named(name: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="file"; filename="%b"' % name


PURPOSE = field("purpose", b"batch")
SECONDS = "expires_after[seconds]"
ANCHOR = field("expires_after[anchor]", b"created_at")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "cut short"),
        (b"no form at all", None, "not the form"),
        (form((FILE, b"1"), PURPOSE, end=b""), None, "last boundary is missing"),
        (form((FILE, b"1"), PURPOSE)[:-5], None, "last boundary is missing"),
        (form(end=b"--" + B + b"--\r\n"), "file", "file is missing"),
        (form(PURPOSE), "file", "file is missing"),
        (form((FILE, b"1")), "purpose", "purpose is missing"),
        (form(field("purpose", b"bitch"), (FILE, b"1")), "purpose", "must be one of batch, assistants"),
        (form(field("purpose", b"batch_output"), (FILE, b"1")), "purpose", "must be one of"),
        (form(field("purpose", b"\xff"), (FILE, b"1")), "purpose", "not UTF-8"),
        (form(field("purpose", b"x" * 2_000), (FILE, b"1")), "purpose", "longer than 1024 bytes"),
        (form(PURPOSE, PURPOSE, (FILE, b"1")), "purpose", "gives purpose twice"),
        (form(PURPOSE, (FILE, b"1"), (FILE, b"2")), "file", "two files"),
        (form(PURPOSE, field("file", b"1")), "file", "has no filename"),
        (form(PURPOSE, (named(b""), b"1")), "file", "has no filename"),
        (form(PURPOSE, (named(b"x/.."), b"1")), "file", "has no filename"),
        (form(PURPOSE, (named(b"x" * 256), b"1")), "file", "longer than 255"),
        (form(PURPOSE, (named(b"x" * 2_000), b"1")), "file", "longer than 255"),
        (form(PURPOSE, (named(b"a\x01b"), b"1")), "file", "control characters"),
        (form(PURPOSE, (FILE.replace(b'"file"', b'"data"'), b"1")), "file", "called 'data'"),
        (form(PURPOSE, (FILE + b"\r\nContent-Transfer-Encoding: base64", b"1")), "file", "is encoded"),
        (form(*[field("x", b"")] * 129), None, "more than 128 parts"),
        (form((FILE, b"1"), PURPOSE, field("expires_after", b"3600")), "expires_after", "as two fields"),
        (form((FILE, b"1"), PURPOSE, ANCHOR), "expires_after[seconds]", "from 3600"),
        (form((FILE, b"1"), PURPOSE, field("expires_after[seconds]", b"3600")), "expires_after[anchor]", "created_at"),
        *(
            (form((FILE, b"1"), PURPOSE, ANCHOR, field(SECONDS, seconds)), SECONDS, "whole")
            for seconds in (b"3599", b"2592001", b"1e5", b"-1", b"", "²".encode(), b"9" * 30)
        ),
    ],
)  # fmt: skip
def test_each_invalid_form_has_its_error(body: bytes, param: str | None, words: str) -> None:
    """The error names the field and says what to do, however the body is cut."""
    for cuts in ([], list(range(len(body)))):
        with pytest.raises(BadRequest, match=words) as refused:
            read(body, cuts)
        assert refused.value.param == param


def test_a_header_without_end_is_refused() -> None:
    """Nobody fills memory with the head of a part."""
    with pytest.raises(BadRequest, match="not the form"):
        FileForm(B).feed(b"--" + B + b"\r\nContent-Disposition: " + b"x" * 100_000)
