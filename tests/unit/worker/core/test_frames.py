"""Engine bytes -> numbered frames."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from openai_api.sse import MAX_EVENT_BYTES
from queue_schemas import END, HEAD, DeadlineExceeded, Frame, Lease, unpack_frames
from tests.support.queue import make_job
from worker.core import FrameCutter


def cutter() -> FrameCutter:
    return FrameCutter(Lease(make_job(), 3, "attempt", 1, 1_000, 5))


def one(packed: bytes) -> Frame:
    (frame,) = unpack_frames(packed)
    return frame


def test_a_plain_answer_is_one_frame_with_head_and_end() -> None:
    """Status, type and body of a plain answer travel in one frame that carries the attempt's identity."""
    frame = one(cutter().whole(404, "application/json", b"{}"))
    assert (frame.seq, frame.flags, frame.status, frame.content_type) == (0, HEAD | END, 404, "application/json")
    assert (frame.epoch, frame.attempt_id, frame.data) == (3, "attempt", b"{}")


def test_half_an_event_is_kept_until_it_is_complete() -> None:
    """A frame ends where an event ends; the rest waits for its other half."""
    cut = cutter()
    cut.head(200, "text/event-stream")
    first = one(cut.feed(b"data: 1\n\ndata: 2"))
    assert (first.data, first.flags, first.status) == (b"data: 1\n\n", HEAD, 200)
    assert cut.feed(b"3\n") == b""
    second = one(cut.feed(b"\ndata: 4\n\n"))
    assert (second.seq, second.flags, second.data) == (1, 0, b"data: 23\n\ndata: 4\n\n")


def test_a_stream_of_a_single_piece_still_has_head_and_end() -> None:
    """What was kept back goes with the last frame, be it the first."""
    cut = cutter()
    cut.head(200, "text/event-stream")
    assert cut.feed(b"data: unfinished") == b""
    last = one(cut.end())
    assert (last.seq, last.flags, last.data) == (0, HEAD | END, b"data: unfinished")


def test_any_line_end_becomes_lf() -> None:
    """[C3] CR, CRLF and mixtures end lines as LF does, also when a CRLF is cut in two; events leave with LF."""
    cut = cutter()
    cut.head(200, "text/event-stream")
    assert one(cut.feed(b"data: 1\r\n\r")).data == b"data: 1\n\n"
    assert cut.feed(b"\ndata: 2") == b""
    assert one(cut.feed(b"\n\r\ndata: 3")).data == b"data: 2\n\n"
    assert one(cut.feed(b"\r\rdata: 4\r")).data == b"data: 3\n\n"
    assert one(cut.feed(b"\n\n")).data == b"data: 4\n\n"


def test_an_event_without_end_is_passed_on_in_pieces() -> None:
    """Memory for one event is bounded."""
    cut = cutter()
    cut.head(200, "text/event-stream")
    assert len(one(cut.feed(b"x" * (MAX_EVENT_BYTES + 1))).data) == MAX_EVENT_BYTES + 1


def test_an_error_before_the_first_frame_is_an_answer_of_its_own() -> None:
    """Nothing was delivered: the client gets status and error object."""
    frame = one(cutter().fail(DeadlineExceeded("too late")))
    assert (frame.status, frame.flags) == (504, HEAD | END)
    assert json.loads(frame.data)["error"]["code"] == "deadline_exceeded"


def test_an_error_in_a_begun_stream_is_an_event_and_drops_half_events() -> None:
    """The stream ends with an error event; a half event before it would make both unreadable."""
    cut = cutter()
    cut.head(200, "text/event-stream")
    cut.feed(b"data: 1\n\ndata: ha")
    frame = one(cut.fail(DeadlineExceeded("too late")))
    assert (frame.seq, frame.flags) == (1, END)
    assert frame.data.startswith(b'data: {"error"')
    assert frame.data.endswith(b"\n\n")


def test_a_workers_error_speaks_the_dialect_of_its_path() -> None:
    """[C2] Before a stream and within one, for clients of the Messages and of the Responses API."""
    lease = Lease(replace(make_job(), path="/v1/messages", request_id="r1"), 3, "attempt", 1, 1_000, 5)
    whole = json.loads(one(FrameCutter(lease).fail(DeadlineExceeded("too late"))).data)
    assert whole == {"type": "error", "error": {"type": "timeout_error", "message": "too late"}, "request_id": "r1"}
    cut = FrameCutter(lease)
    cut.head(200, "text/event-stream")
    cut.feed(b"data: 1\n\n")
    assert one(cut.fail(DeadlineExceeded("too late"))).data.startswith(b'event: error\ndata: {"type": "error"')
    cut = FrameCutter(replace(lease, job=replace(lease.job, path="/v1/responses")))
    cut.head(200, "text/event-stream")
    cut.feed(b'event: x\ndata: {"type": "x", "sequence_number": 4}\n\n')
    assert b'"sequence_number": 5' in one(cut.fail(DeadlineExceeded("too late"))).data


def test_headers_go_only_to_routers_that_read_them() -> None:
    """[C7] A job without ``headers`` is of an older Router, which refuses frames that have them; cookies go to none."""
    told = {"retry-after": "7", "set-cookie": "a=b"}
    for headers, expected in ((None, {}), ({}, {"retry-after": "7"})):
        lease = Lease(replace(make_job(), headers=headers), 3, "attempt", 1, 1_000, 5)
        assert one(FrameCutter(lease).whole(429, "application/json", b"{}", told)).headers == expected
        cut = FrameCutter(lease)
        cut.head(200, "text/event-stream", headers=told)
        assert one(cut.feed(b"data: 1\n\n")).headers == expected
        late = one(FrameCutter(lease).fail(DeadlineExceeded("late")))
        assert late.headers == ({} if headers is None else {"x-should-retry": "false"})


PARTS = st.sampled_from([b"data: a", b"\n", b"\r\n", b"\n\n", b"b", b"\r\n\r\n", b"\r"])


@given(st.lists(PARTS, max_size=40), st.data())
def test_frames_concatenate_to_the_stream_and_end_at_borders(parts: list[bytes], data: st.DataObject) -> None:
    """However the bytes arrive, the frames are the stream with LF as its line end, numbered without a gap, cut only
    between events."""
    stream = b"".join(parts)
    cut = cutter()
    cut.head(200, "text/event-stream")
    packed = []
    rest = stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        packed.append(cut.feed(rest[:size]))
        rest = rest[size:]
    packed.append(cut.end())
    frames = unpack_frames(b"".join(packed))
    assert b"".join(frame.data for frame in frames) == stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert all(frame.data.endswith(b"\n\n") for frame in frames[:-1])
