"""Ranges, tags and names of a file's content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import RangeNotSatisfiable
from router.files.rules import content_disposition, etag_matches, read_range


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, None), ("", None), ("bytes=0-", (0, 10)), ("bytes=2-4", (2, 5)), ("bytes=2-99", (2, 10)),
        ("bytes=-3", (7, 10)), ("bytes=-99", (0, 10)), ("Bytes = 9 - 9", (9, 10)), ("bytes=-", None),
        ("bytes=4-2", None), ("bytes=0-1,3-4", None), ("lines=0-1", None), ("bytes=a-b", None),
        ("bytes=" + "9" * 40 + "-", None),
    ],
)  # fmt: skip
def test_a_range_is_read_or_ignored(header: str | None, span: tuple[int, int] | None) -> None:
    """One range is taken, what is none or several is ignored, as the standard allows."""
    assert read_range(header, 10) == span


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-5", 0)])
def test_a_range_past_the_end_is_refused(header: str, size: int) -> None:
    """What no byte can satisfy is an error that says how many there are."""
    with pytest.raises(RangeNotSatisfiable, match=f"{size} bytes"):
        read_range(header, size)


def test_an_etag_is_found_among_others() -> None:
    """Weak, in a list, or any."""
    assert etag_matches('"a", W/"b"', '"b"')
    assert etag_matches("*", '"b"')
    assert not etag_matches('"a"', '"b"')
    assert not etag_matches(None, '"b"')


@given(st.text(min_size=1))
def test_a_filename_cannot_break_out_of_its_header(name: str) -> None:
    """Whatever it is called, the header is one line of ASCII with two quotes at most."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    header = content_disposition(name)
    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
