"""Wire messages that nobody of ours wrote: read, or refused with the errors of the contract, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_schemas import (
    BANDS,
    CONTINUED,
    END,
    HEAD,
    BadMessage,
    Control,
    ControlKind,
    Frame,
    Job,
    JobId,
    Lane,
    Marker,
    MarkerKind,
    Pool,
    Tenant,
    UnsupportedVersion,
    codec,
    new_job_id,
    parse_control,
)
from queue_schemas.frames import unpack_frames, unpack_marker
from tests.support.queue import make_job

GOLDEN = [
    bytes.fromhex("".join(line.partition("#")[0] for line in path.read_text().splitlines()))
    for path in sorted((Path(__file__).parents[2] / "golden").glob("*.hex"))
]
MAX_ERROR = 1_000

any_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
job_ids = st.builds("{}-{:032x}".format, st.integers(0, 9_999), st.integers(0, 2**128 - 1)).map(JobId)
counts = st.integers(0, 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=60)
jobs = st.builds(
    Job, id=job_ids, tenant=names.map(Tenant), model=names.map(Pool),
    path=st.from_regex(r"/[a-z0-9_/-]{1,30}", fullmatch=True), body=st.binary(max_size=60),
    content_type=st.sampled_from(["application/json", "multipart/form-data; boundary=x"]), lane=st.sampled_from(Lane),
    band=st.integers(0, BANDS - 1), stream=st.booleans(), persisted=st.booleans(), ttl_ms=st.integers(1, 2**40),
    max_attempts=st.integers(1, 100), on_loss=st.sampled_from(["continue", "restart", "fail"]), prefix=text,
    request_id=st.from_regex(r"[A-Za-z0-9_.:-]{0,40}", fullmatch=True), cost_estimate=counts,
)  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    flags = draw(st.sampled_from([0, END, HEAD, HEAD | END, HEAD | CONTINUED]))
    head = (draw(st.integers(200, 599)), draw(st.sampled_from(["application/json", ""]))) if flags & HEAD else (0, "")
    return Frame(draw(job_ids), draw(counts), draw(names), draw(counts), flags, draw(st.binary(max_size=40)), *head)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A golden message with bytes changed, cut out, put in and doubled."""
    data = bytearray(draw(st.sampled_from(GOLDEN)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "double", "end"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "double":
                data[at:at] = data[at : at + 16]
            case "end":
                del data[at:]
    return bytes(data)


@st.composite
def spoilt_envelopes(draw: st.DrawFn) -> bytes:
    """An envelope with fields of any kind in place of some of its own."""
    fields = codec.decode(draw(jobs).pack())
    fields |= draw(st.dictionaries(st.sampled_from(sorted(fields)), any_value, min_size=1, max_size=3))
    return codec.encode(fields)


messages = st.binary(max_size=80) | mutated() | spoilt_envelopes() | any_value.map(codec.encode)


@settings(max_examples=300, derandomize=True)
@given(messages)
def test_any_bytes_are_a_message_or_are_refused_with_a_short_sentence(data: bytes) -> None:
    """Envelopes, frames, markers and control messages raise BadMessage or UnsupportedVersion, which fit a log line."""
    readers: list[Any] = [Job.unpack, unpack_frames, unpack_marker, codec.decode, codec.decode_all]
    readers += [
        lambda raw: parse_control({b"k": b"abort", b"job": raw, b"why": raw}),
        lambda raw: parse_control({b"k": raw}),
    ]
    for read in readers:
        try:
            read(data)
        except (BadMessage, UnsupportedVersion) as error:
            assert len(error.message) < MAX_ERROR
            assert error.message.isprintable()


@pytest.mark.parametrize("field", ["v", "id", "lane", "on_loss", "model", "tenant", "region"])
def test_a_long_wrong_field_makes_a_short_error(field: str) -> None:
    """What is wrong is shown, but not at a length that fills logs and answers."""
    envelope = codec.decode(make_job().pack()) | {field: "\x1b" + "x" * 100_000}
    with pytest.raises((BadMessage, UnsupportedVersion)) as refusal:
        Job.unpack(codec.encode(envelope))
    assert len(refusal.value.message) < MAX_ERROR
    assert refusal.value.message.isprintable()


@pytest.mark.parametrize("status", [-1, 0, 99, 100, 199, 600, 2**40])
def test_a_frame_with_a_status_that_no_answer_has_is_refused(status: int) -> None:
    """A Router could not send it."""
    with pytest.raises(BadMessage, match="status"):
        unpack_frames(Frame(new_job_id(0), 1, "a", 0, HEAD | END, b"", status, "text/plain").pack())


@settings(max_examples=60, derandomize=True)
@given(jobs, st.lists(frames(), max_size=4), st.builds(Marker, st.sampled_from(MarkerKind), job_ids, counts, text))
def test_what_is_written_is_read(job: Job, run: list[Frame], marker: Marker) -> None:
    """Every message that our writers can make comes out as it went in."""
    assert Job.unpack(job.pack()) == job
    assert unpack_frames(b"".join(frame.pack() for frame in run)) == run
    assert unpack_marker(marker.pack()) == marker


@settings(max_examples=20, derandomize=True)
@given(job_ids, text)
def test_an_abort_that_is_written_is_read(job_id: JobId, reason: str) -> None:
    """So does a control message."""
    control = Control(ControlKind.ABORT, job_id, reason)
    assert parse_control({name.encode(): value.encode() for name, value in control.fields().items()}) == control
