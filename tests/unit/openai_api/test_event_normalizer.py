"""Event streams as they leave the Router: every decoder reads the same events, wherever the bytes are cut."""

from __future__ import annotations

import json
import random

import pytest

from openai_api.errors import Dialect, keepalive
from openai_api.event_normalizer import EventNormalizer
from router.jobs.event_ids import EventNumbers
from tests.support.event_streams import DECODERS, Event, single_bytes

ONE, TWO = b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n'
DONE = b"data: [DONE]\n\n"
PLAIN: list[Event] = [("", '{"n": 1}'), ("", '{"n": 2}'), ("", "[DONE]")]

STREAMS: dict[str, tuple[bytes, list[Event]]] = {
    "plain": (ONE + TWO + DONE, PLAIN),
    "comments": (b": hi\n\n" + ONE + b": ping\n\n" + TWO + b":\n\n" + DONE, PLAIN),
    "comment lines in events": (b": hi\n" + ONE + b'data: {"n": 2}\n: x\n\n' + DONE, PLAIN),
    "retry alone": (b"retry: 3000\n\n" + ONE + b"retry: 5\n\n" + TWO + DONE, PLAIN),
    "names alone": (b"event: open\n\n" + ONE + b"event: tick\n\n" + TWO + DONE + b"event: end\n\n", PLAIN),
    "ids alone": (b"id: 7\n\n" + ONE + b"id\n\n" + TWO + DONE, PLAIN),
    "ids of the engine": (b'id: 1\ndata: {"n": 1}\n\n: p\n\nid: 2\ndata: {"n": 2}\n\nid: 3\ndata: [DONE]\n\n', PLAIN),
    "empty data": (b"data:\n\n" + ONE + b"data: \n\n" + b"event: x\ndata\n\n" + TWO + DONE, PLAIN),
    "blank lines": (b"\n\n\n" + ONE + b"\n\n\n" + TWO + b"\n" + DONE + b"\n", PLAIN),
    "crlf": ((b": c\n\n" + ONE + TWO + DONE).replace(b"\n", b"\r\n"), PLAIN),
    "mixed line ends": (b'data: {"n": 1}\n\r\ndata: {"n": 2}\r\n\ndata: [DONE]\n\n', PLAIN),
    "byte order mark": (b"\xef\xbb\xbf" + ONE + TWO + DONE, PLAIN),
    "no last blank line": (ONE + TWO + b"data: [DONE]", PLAIN),
    "one line end at the end": (ONE + TWO + b"data: [DONE]\n", PLAIN),
    "several lines of data": (b'data: {"a":\ndata:  1}\n\n' + DONE, [("", '{"a":\n 1}'), ("", "[DONE]")]),
    "names": (b'event: a\ndata: {"n": 1}\n\nevent:b\ndata:{"n": 2}\n\n', [("a", '{"n": 1}'), ("b", '{"n": 2}')]),
    "unknown fields": (b'foo: 1\ndata: {"n": 1}\nbar\n\n' + TWO + DONE, PLAIN),
    "other letters": ('data: {"n": "ü€𝄞"}\n\n'.encode(), [("", '{"n": "ü€𝄞"}')]),
    "words of errors": (b'data: {"say": "\\"error\\": no"}\n\n', [("", '{"say": "\\"error\\": no"}')]),
}


def cuts(stream: bytes) -> list[list[bytes]]:
    """``stream`` whole, by bytes, in two at every place, and at random."""
    rng = random.Random(3)
    halves = [[stream[:at], stream[at:]] for at in range(1, len(stream))]
    places = [sorted(rng.choices(range(len(stream) + 1), k=rng.randrange(9))) for _ in range(50)]
    random_cuts = [[stream[a:b] for a, b in zip([0, *at], [*at, len(stream)], strict=True)] for at in places]
    return [[stream], single_bytes(stream), *halves, *random_cuts]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("numbered", [False, True])
def test_every_decoder_reads_the_same_events(name: str, numbered: bool) -> None:
    """[C1] Comments, retry, names and ids alone, blank lines, empty data: no SDK sees an event without data, with
    ids or without, however the engine's bytes and those to the client are cut."""
    stream, expected = STREAMS[name]
    seen = set()
    for pieces in cuts(stream):
        events = EventNumbers(prefix="job:") if numbered else EventNormalizer()
        seen.add(b"".join(map(events.feed, pieces)) + events.finish())
    assert len(seen) == 1
    sent = seen.pop()
    for decode in DECODERS.values():
        assert decode([sent]) == expected
        assert decode(single_bytes(sent)) == expected
    if numbered:
        assert sent.count(b"\nid: job:") == len(expected) == sent.count(b"\n\n")


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("numbered", [False, True])
def test_signs_of_life_between_events_are_no_events(name: str, numbered: bool) -> None:
    """[C1] A keep-alive wherever one may be sent, before, between and behind events with ids, changes no event."""
    stream, expected = STREAMS[name]
    events = EventNumbers() if numbered else EventNormalizer()
    sent = [keepalive(Dialect.OPENAI, "queued")]
    for piece in [*(part + b"\n\n" for part in stream.split(b"\n\n")[:-1]), stream.rpartition(b"\n\n")[2]]:
        sent += [events.feed(piece), keepalive(Dialect.OPENAI, "waiting for\na worker")]
    sent += [events.finish(), keepalive(Dialect.OPENAI, "queued")]
    for decode in DECODERS.values():
        assert decode(single_bytes(b"".join(sent))) == expected


def test_the_plainest_events_pass_untouched() -> None:
    """What nearly every engine sends is not taken apart: it is the same object."""
    for stream in (ONE, ONE + TWO, DONE, b'event: x\ndata: {"a": 1}\n\n', b'data:["x"]\n\n'):
        assert EventNormalizer().feed(stream) is stream


def test_a_comment_of_the_engine_is_passed_on_at_once() -> None:
    """[C1] It keeps connections alive, with its own words, in a stream with ids as well."""
    numbers = EventNumbers()
    assert numbers.feed(ONE).endswith(b"\n\n")
    assert numbers.feed(b": still thinking\n\n") == b": still thinking\n"


def test_what_the_reader_has_is_left_out_with_its_comments() -> None:
    """[C1] Whoever goes on behind an event gets the comments behind it, and none before it."""
    stream = b": a\n\n" + ONE + b": b\n\n" + TWO + b": c\n\n" + DONE
    whole = EventNumbers()
    sent = whole.feed(stream) + whole.finish()
    second = sent.split(b"id: ")[2].split(b"\n")[0].decode()
    from router.jobs.event_ids import find_position  # noqa: PLC0415

    rest = EventNumbers(find_position(second))
    assert rest.feed(stream) + rest.finish() == sent.split(second.encode() + b"\n\n")[1]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (
            b'data: {"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}\n\n',
            "too long",
        ),
        (b'data: {"object": "error", "message": "late", "code": 500}\r\n\r\n', "late"),
    ],
)
def test_an_older_error_within_a_stream_is_wrapped(event: bytes, message: str) -> None:
    """[C4] vLLM's older error object, as an event, becomes one on which the SDKs raise."""
    sent = EventNormalizer().feed(event)
    [(name, data)] = DECODERS["openai"]([sent])
    assert name == ""
    assert json.loads(data)["error"]["message"] == message


def test_the_apis_own_errors_pass_as_they_are() -> None:
    """[C4] Nothing of an error that clients understand is changed."""
    for dialect, event in (
        (Dialect.OPENAI, b'data: {"error": {"message": "no", "code": 1, "more": [1]}}\n\n'),
        (Dialect.RESPONSES, b'event: error\ndata: {"type": "error", "message": "no", "sequence_number": 3}\n\n'),
        (Dialect.ANTHROPIC, b'event: error\ndata: {"type": "error", "error": {"type": "x", "message": "no"}}\n\n'),
    ):
        assert EventNormalizer(dialect).feed(event) == event


def test_an_openai_error_in_a_message_stream_gets_its_name() -> None:
    """[C2] The anthropic SDK passes over events without a name: an engine's error of OpenAI's shape is given one."""
    sent = EventNormalizer(Dialect.ANTHROPIC, "r1").feed(
        b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
    )
    [(name, data)] = DECODERS["anthropic"]([sent])
    assert name == "error"
    assert json.loads(data) == {
        "type": "error", "error": {"type": "api_error", "message": "out of memory"}, "request_id": "r1",
    }  # fmt: skip
