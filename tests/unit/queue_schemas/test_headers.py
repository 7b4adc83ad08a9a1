"""Headers that pass through the fabric: an allowlist in each direction, bounded, out of messages as well."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest

from queue_schemas import END, HEAD, Frame, Job, unpack_frames
from queue_schemas.headers import (
    CLIENT_HEADERS,
    ENGINE_HEADERS,
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    for_client,
    for_engine,
    retry_after_s,
)
from tests.unit.queue_schemas.test_golden import JOB_ID, SMALL_JOB

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-authorization"}
SECRET = {"authorization", "x-api-key", "cookie", "set-cookie", "x-inferq-join-token", "host", "content-length"}


def test_nothing_of_a_connection_or_a_secret_is_passed_on() -> None:
    """[C7] Neither list has a header of one connection, a credential or a cookie."""
    assert not (ENGINE_HEADERS | CLIENT_HEADERS) & (HOP_BY_HOP | SECRET)


def test_a_requests_headers_are_chosen() -> None:
    """[C7] What is on the list passes, whole; baggage, credentials and whatever else is sent do not."""
    assert for_engine(
        [
            (b"tracestate", b"a=1,\tb=2"),
            (b"anthropic-version", b"2023-06-01"),
            (b"authorization", b"Bearer x"),
            (b"baggage", b"user=7"),
            (b"x-anything", b"1"),
            (b"tracestate", b"c=3"),
        ]
    ) == {"tracestate": "a=1,b=2,c=3", "anthropic-version": "2023-06-01"}


def test_a_long_tracestate_keeps_its_newest_members() -> None:
    """[C7] 32 members and 512 characters at most; members of more than 128 go first (W3C Trace Context, 3.3.1)."""
    given = for_engine(
        [(b"tracestate", b"new=" + b"x" * 200 + b"," + b",".join(b"k%d=%d" % (n, n) for n in range(90)))]
    )
    members = given["tracestate"].split(",")
    assert members[0] == "k0=0"
    assert len(members) == 32
    assert len(given["tracestate"]) <= 512


@pytest.mark.parametrize("value", [b"a\x00b", "t\u00e4g".encode(), b"a\r\nx: y", b""])
def test_what_cannot_be_sent_is_left_out(value: bytes) -> None:
    """[C7] Nothing that would end a header's line, or that no header may hold."""
    assert for_engine([(b"openai-beta", value)]) == {}
    assert for_client({"metadata": value.decode("latin-1")}) == {}


def test_both_directions_are_bounded() -> None:
    """[C7] Metadata of many inputs passes; more than the limit does not."""
    metadata = "x" * 40_000
    assert for_client({"metadata": metadata, "set-cookie": "a=b"}) == {"metadata": metadata}
    assert for_client({"metadata": "x" * MAX_ANSWER_BYTES}) == {}
    assert for_engine([(b"anthropic-beta", b"x" * MAX_REQUEST_BYTES)]) == {}


def test_a_message_cannot_bring_other_headers() -> None:
    """[C7] What another process wrote is chosen again: no cookie of a worker's, no credential of a Router's."""
    fields = msgpack.unpackb(SMALL_JOB.pack()) | {
        "headers": {"authorization": "x", "tracestate": "a=1", "openai-beta": 3}
    }
    assert Job.unpack(msgpack.packb(fields)).headers == {"tracestate": "a=1"}
    frame = Frame(JOB_ID, 1, "a", 0, HEAD | END, b"", 200, "text/plain", {"set-cookie": "a", "retry-after": "3"})
    assert unpack_frames(frame.pack())[0].headers == {"retry-after": "3"}


def test_two_versions_share_a_queue() -> None:
    """[C7] What has no headers is written as before them; a job without the field is of a Router that reads none."""
    assert "headers" not in msgpack.unpackb(SMALL_JOB.pack())
    assert Job.unpack(replace(SMALL_JOB, headers={}).pack()).headers == {}
    assert len(msgpack.unpackb(Frame(JOB_ID, 1, "a", 0, HEAD, b"", 200, "x").pack())) == 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Thu, 01 Jan 1970 00:20:00 GMT", 200.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("9" * 5000, 999_999_999.0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("\u0665", None),
        ("Thu, 99 Jan 1970 00:20:00 GMT", None),
        ("Thu, 01 Jan 99999999999999 00:20:00 GMT", None),
    ],
)
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    """Seconds or a date, at 1000 s after 1970; anything else asks for nothing."""
    assert retry_after_s(value, 1_000.0) == seconds
