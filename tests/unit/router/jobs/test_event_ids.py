"""Event ids: however the stream was cut, and wherever its client stopped, the rest follows once."""

from __future__ import annotations

import random
import re
import time

import pytest

from openai_api.sse import encode_event
from queue_schemas import BadRequest, StreamBroken, new_job_id
from router.jobs.event_ids import EventNumbers, Position, find_position, read_position

EVENTS = [
    b"data: one\n\n",
    b"event: x\r\ndata: two\r\n\r\n",
    b": a comment\n\n",
    b"data: \xc3\xbc\ndata:\n\n",
    b"data: 5\n\n",
]
STREAM = b"".join(EVENTS)
SENT = [b"data: one\n\n", b"event: x\ndata: two\n\n", b": a comment\n", b"data: \xc3\xbc\ndata:\n\n", b"data: 5\n\n"]
"""What a client gets of it, without ids: a comment is no event, and has no blank line."""
_ID = re.compile(rb"^id: (\S+)\n", re.MULTILINE)


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """``data`` in pieces of random length."""
    places = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(0, 8)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def numbered(pieces: list[bytes], after: Position | None = None, prefix: str = "") -> bytes:
    numbers = EventNumbers(after, prefix)
    return b"".join(map(numbers.feed, pieces)) + numbers.finish()


def bare(stream: bytes) -> bytes:
    """Without its ids."""
    return _ID.sub(b"", stream)


def test_ids_do_not_depend_on_how_the_stream_was_cut() -> None:
    """Nor does anything else; only events have ids, so that no blank line follows an id without data."""
    whole = numbered([STREAM])
    assert bare(whole) == b"".join(SENT)
    assert [given.split(b"-")[0] for given in _ID.findall(whole)] == [b"1", b"2", b"3", b"4"]
    rng = random.Random(7)
    for _ in range(500):
        assert numbered(cut(STREAM, rng)) == whole


def test_a_stream_can_be_resumed_behind_any_event() -> None:
    """With its id or its number alone, however the rest is cut: what follows, with the same ids."""
    whole = numbered([STREAM], prefix="job:")
    rng = random.Random(11)
    for number, given in enumerate(_ID.findall(whole), 1):
        _, _, name = given.partition(b":")
        behind = whole[whole.index(given) :].split(b"\n", 1)[1].lstrip(b"\r\n")
        for value in (name.decode(), str(number)):
            for _ in range(20):
                rest = numbered(cut(STREAM, rng), read_position(value, "starting_after"), "job:")
                assert rest == behind


def test_many_events_are_numbered_in_linear_time() -> None:
    """Time grows with the size of a piece, not with its square: the event loop is blocked meanwhile."""
    pages = [b"data: word\n\n" * count for count in (4_000, 64_000)]
    took_s = []
    for page in pages:
        began = time.process_time()
        EventNumbers().feed(page)
        took_s.append(time.process_time() - began)
    assert took_s[1] < 100 * max(took_s[0], 0.002)


def test_another_stream_is_not_resumed() -> None:
    """One that differs before the position, or ends before it; a bare number is not checked."""
    last = _ID.findall(numbered(EVENTS[:4]))[-1].decode()
    other = [b"data: uno\n\n", *EVENTS[1:]]
    with pytest.raises(StreamBroken, match="was restarted"):
        numbered(other, find_position(last))
    assert bare(numbered(other, find_position("3"))) == b"".join(SENT[4:])
    with pytest.raises(StreamBroken, match="has 2 events"):
        numbered(EVENTS[:2], find_position(last))


def test_a_long_event_is_passed_on_in_pieces() -> None:
    """Only the half of a blank line is held back; its id, that of the whole event, follows."""
    long = b"data: " + b"x" * 70_000
    numbers = EventNumbers()
    assert numbers.feed(long) == long
    assert numbers.feed(b"y\n") == b"y"
    assert numbers.inside
    end = numbers.feed(b"\n")
    assert end.startswith(b"\nid: 1-")
    assert not numbers.inside
    assert long + b"y" + end == numbered([long + b"y\n\n"])
    assert numbers.feed(b"data: cut off\r\n") == b""
    assert bare(numbers.finish()) == b"data: cut off\n\n"
    assert numbers.number == 2


@pytest.mark.parametrize("value", ["", "x", "-1", "1-2", "1-0123456g", "0-12:3", "9" * 16, "1\n2", "../1"])
def test_a_malformed_event_id_is_refused(value: str) -> None:
    """The error names the parameter and the expected form."""
    assert find_position(value) is None
    with pytest.raises(BadRequest, match="starting_after must be the id of an event") as refused:
        read_position(value, "starting_after")
    assert refused.value.param == "starting_after"


def test_an_id_may_name_its_job() -> None:
    """So that the id alone says where to continue."""
    job_id = new_job_id(12)
    assert find_position(f" {job_id}:17-9f3a2b1c") == Position(17, "9f3a2b1c", job_id)


def test_a_body_is_one_event() -> None:
    """Each of its lines a line of data."""
    assert encode_event(b"a\nb") == b"data: a\ndata: b\n\n"
    assert encode_event(b"") == b"data: \n\n"
