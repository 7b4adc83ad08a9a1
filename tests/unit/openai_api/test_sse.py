"""Server-sent events are built and split in one form."""

from __future__ import annotations

import pytest

from openai_api.sse import encode_event, encode_json, end_of_events, event_data, has_event_field, split_events
from tests.support.event_streams import DECODERS


@pytest.mark.parametrize(
    ("data", "name", "event"),
    [
        (b"{}", "", b"data: {}\n\n"),
        (b"{}", "ping", b"event: ping\ndata: {}\n\n"),
        (b"", "", b"data: \n\n"),
        (b"a\nb\r\nc\rd\n", "", b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        (b"a\nb", "x", b"event: x\ndata: a\ndata: b\n\n"),
    ],
)
def test_an_event_holds_every_line_of_its_data(data: bytes, name: str, event: bytes) -> None:
    """However the lines end, so that no line of the data is read as a field."""
    assert encode_event(data, name) == event
    assert event_data(event) == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip()


def test_json_is_one_line_that_every_decoder_reads() -> None:
    """Line ends within JSON strings are escaped."""
    event = encode_json({"text": "one\ntwo"}, "said")
    assert event == b'event: said\ndata: {"text":"one\\ntwo"}\n\n'
    for decode in DECODERS.values():
        assert decode([event]) == [("said", '{"text":"one\\ntwo"}')]


def test_a_stream_is_split_at_its_blank_lines() -> None:
    """With LF or CRLF, and with LF in the events that come out."""
    assert split_events(b"data: 1\n\n: c\n\n\n\ndata: 2\r\n\r\n") == [b"data: 1\n\n", b": c\n\n", b"data: 2\n\n"]
    assert [event_data(event) for event in (b"data: 1\ndata:2\n\n", b": c\n\n", b"event: x\n\n")] == [b"1\n2", b"", b""]


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n\r\n"])
def test_the_end_of_whole_events_is_found_wherever_the_stream_was_cut(blank: bytes) -> None:
    """Also where the blank line lies across two pieces, of which the first is known to hold no whole one."""
    stream = b"data: 1" + blank + b"data: 2"
    end = stream.index(b"data: 2")
    assert end_of_events(stream) == end
    assert all(end_of_events(stream, known) == end for known in range(end))
    assert end_of_events(b"data: 2") == 0


def test_a_body_is_an_event_stream_if_a_line_is_a_field() -> None:
    """Whatever its content type says."""
    assert has_event_field(b"x\ndata: 1")
    assert has_event_field(b"\xef\xbb\xbf: c")
    assert not has_event_field(b'{"data": 1}')
