"""Frames of what a worker sends over HTTP."""

from __future__ import annotations

import pytest

from queue_schemas import CONTINUED, END, HEAD, BadMessage, Job, JobId, Lease, Pool, SessionId, unpack_frames
from queue_schemas.worker_protocol.jobs import NOBODY
from queue_schemas.worker_protocol.output import Head, Output
from router.workers.frames import pack_output
from router.workers.lease_tokens import HeldLease

JOB = Job(id=JobId("0-" + "a" * 32), tenant=NOBODY, model=Pool("m"), path="", body=b"")
HELD = HeldLease(SessionId("edge.0123456789abcdef"), Lease(JOB, 3, "aid", 1, 0, 0), 0)
HEAD_OF_STREAM = Head(status=200, content_type="text/event-stream", headers={"retry-after": "1"})


def output(**fields: object) -> Output:
    return Output.model_validate({"lease": "l", **fields})


def test_pieces_become_numbered_frames() -> None:
    """The first with the head, and of a settle the last as the end; attempt and epoch are the lease's."""
    frames = unpack_frames(pack_output(HELD, output(seq=0, head=HEAD_OF_STREAM, data=[b"a", b"b", b"c"]), ends=True))
    assert [(frame.seq, frame.flags, frame.data) for frame in frames] == [(0, HEAD, b"a"), (1, 0, b"b"), (2, END, b"c")]
    assert {(frame.job_id, frame.epoch, frame.attempt_id) for frame in frames} == {(JOB.id, 3, "aid")}
    assert (frames[0].status, frames[0].content_type) == (200, "text/event-stream")
    assert frames[0].headers == {"retry-after": "1"}


def test_a_settle_without_pieces_is_an_empty_last_frame() -> None:
    """All was sent before."""
    [frame] = unpack_frames(pack_output(HELD, output(seq=7), ends=True))
    assert (frame.seq, frame.flags, frame.data) == (7, END, b"")
    assert pack_output(HELD, output(seq=7), ends=False) == b""


def test_a_whole_answer_is_one_frame() -> None:
    """Begin and end in one, continued if it says so."""
    head = Head(status=400, content_type="application/json", continued=True)
    [frame] = unpack_frames(pack_output(HELD, output(seq=0, head=head, data=[b"{}"]), ends=True))
    assert (frame.flags, frame.status) == (HEAD | CONTINUED | END, 400)


@pytest.mark.parametrize("fields", [{"seq": 0}, {"seq": 1, "head": HEAD_OF_STREAM}])
def test_a_head_goes_with_the_first_piece_alone(fields: dict[str, object]) -> None:
    """Anything else is a fault of the worker."""
    with pytest.raises(BadMessage, match="head"):
        pack_output(HELD, output(data=[b"x"], **fields), ends=False)
