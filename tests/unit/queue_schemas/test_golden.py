"""Golden bytes: what version 1 of each message looks like on the wire, for workers in other languages and for ever.

The files under ``tests/golden`` hold hex with comments. A change that alters them breaks running fleets during a
rolling upgrade: raise the version instead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from queue_schemas import (
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
    parse_control,
    unpack_frames,
)
from queue_schemas.frames import FramePacker, unpack_marker

GOLDEN = Path(__file__).parents[2] / "golden"
JOB_ID = JobId("3-000102030405060708090a0b0c0d0e0f")

FULL_JOB = Job(
    id=JOB_ID,
    tenant=Tenant("acme"),
    model=Pool("org/model-7B"),
    path="/v1/chat/completions",
    body=b'{"model":"org/model-7B","messages":[]}',
    content_type="application/json",
    lane=Lane.BATCH,
    band=1,
    stream=True,
    persisted=True,
    ttl_ms=86_400_000,
    max_attempts=5,
    on_loss="continue",
    cost_estimate=1234,
    affinity="0f1e2d3c",
    reply_to="router-1.0011223344556677",
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    idempotency_key="order-17",
    request_id="req-42",
)
SMALL_JOB = Job(id=JOB_ID, tenant=Tenant("t"), model=Pool("m"), path="/v1/embeddings", body=b"\x00\xff")
REGIONAL_JOB = replace(SMALL_JOB, region="eu-west", remote_after_ms=500)
RESUMED_JOB = replace(SMALL_JOB, path="/v1/completions", stream=True, prefix="Il \u00e9tait ")
TOLD_JOB = replace(
    SMALL_JOB,
    headers={"tracestate": "vendor=1", "anthropic-version": "2023-06-01"},
    deadline_from="600000 ms (set by INFERQ_ROUTER_DEFAULT_DEADLINE_MS)",
)
WHOLE_FRAME = Frame(JOB_ID, 1, "a1b2c3d4e5f60", 0, HEAD | END, b'{"id":"x"}', 200, "application/json")
FRAME_RUN = (
    Frame(JOB_ID, 7, "a1b2c3d4e5f60", 0, HEAD, b"data: 1\n\n", 200, "text/event-stream"),
    Frame(JOB_ID, 7, "a1b2c3d4e5f60", 1, 0, b"data: 2\n\n"),
    Frame(JOB_ID, 7, "a1b2c3d4e5f60", 2, END, b""),
)
CONTINUED_FRAME = Frame(JOB_ID, 3, "a1b2c3d4e5f60", 0, HEAD | CONTINUED, b"data: 4\n\n", 200, "text/event-stream")
TOLD_FRAME = Frame(
    JOB_ID, 1, "a1b2c3d4e5f60", 0, HEAD | END, b"{}", 429, "application/json", {"retry-after": "7"}
)  # fmt: skip
MARKERS = tuple(Marker(kind, JOB_ID, 2, "its worker was lost") for kind in MarkerKind)
CONTROLS = (
    Control(ControlKind.WAKE),
    Control(ControlKind.ABORT, JOB_ID, "the client went away"),
    Control(ControlKind.DRAIN),
    Control(ControlKind.PING),
)


def entry(control: Control) -> bytes:
    """A stream entry as lines ``field value``, in order."""
    return "\n".join(f"{field} {value}" for field, value in control.fields().items()).encode()


MESSAGES = {
    "job_v1_full": FULL_JOB.pack(),
    "job_v1_defaults": SMALL_JOB.pack(),
    "job_v1_region": REGIONAL_JOB.pack(),
    "job_v1_resumed": RESUMED_JOB.pack(),
    "job_v1_headers": TOLD_JOB.pack(),
    "frame_whole": WHOLE_FRAME.pack(),
    "frame_run": b"".join(frame.pack() for frame in FRAME_RUN),
    "frame_continued": CONTINUED_FRAME.pack(),
    "frame_headers": TOLD_FRAME.pack(),
    **{f"marker_{marker.kind}": marker.pack() for marker in MARKERS},
    **{f"control_{control.kind}": entry(control) for control in CONTROLS},
}


def golden(name: str) -> bytes:
    """The bytes in a golden file."""
    lines = (GOLDEN / f"{name}.hex").read_text().splitlines()
    return bytes.fromhex("".join(line.partition("#")[0] for line in lines))


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_written_as_ever(name: str) -> None:
    """Today's writer produces the golden bytes."""
    assert MESSAGES[name] == golden(name)


def test_every_golden_file_is_checked() -> None:
    """No file lies there unread."""
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(MESSAGES)


def test_jobs_are_read_as_ever() -> None:
    """Today's reader understands golden envelopes, with every field."""
    assert Job.unpack(golden("job_v1_full")) == FULL_JOB
    assert Job.unpack(golden("job_v1_defaults")) == SMALL_JOB
    assert Job.unpack(golden("job_v1_region")) == REGIONAL_JOB
    assert Job.unpack(golden("job_v1_resumed")) == RESUMED_JOB
    assert Job.unpack(golden("job_v1_headers")) == TOLD_JOB


def test_frames_and_markers_are_read_as_ever() -> None:
    """Today's reader understands golden answers."""
    assert unpack_frames(golden("frame_whole")) == [WHOLE_FRAME]
    assert unpack_frames(golden("frame_run")) == list(FRAME_RUN)
    assert unpack_frames(golden("frame_headers")) == [TOLD_FRAME]
    assert unpack_frames(golden("frame_continued")) == [CONTINUED_FRAME]
    for marker in MARKERS:
        assert unpack_marker(golden(f"marker_{marker.kind}")) == marker


@pytest.mark.parametrize("seq", [1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize(("epoch", "flags"), [(1, 0), (70_000, END)])
def test_frames_behind_the_first_are_packed_alike(seq: int, size: int, epoch: int, flags: int) -> None:
    """The packer of an attempt writes byte for byte what a frame's own ``pack`` writes."""
    frame = Frame(JOB_ID, epoch, "attempt-1", seq, flags, b"x" * size)
    assert FramePacker(JOB_ID, epoch, "attempt-1").pack(seq, flags, frame.data) == frame.pack()


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: str(control.kind))
def test_control_messages_are_read_as_ever(control: Control) -> None:
    """Today's reader understands golden control entries."""
    lines = golden(f"control_{control.kind}").splitlines()
    assert parse_control(dict(line.split(b" ", 1) for line in lines)) == control


def test_unknown_fields_of_a_job_are_ignored() -> None:
    """A newer Router may say more; an older worker still runs the job."""
    fields = msgpack.unpackb(FULL_JOB.pack())
    assert Job.unpack(msgpack.packb(fields | {"colour": "green", "deep": {"er": [1]}})) == FULL_JOB


def test_missing_optional_fields_have_their_defaults() -> None:
    """An older Router may say less."""
    fields = msgpack.unpackb(SMALL_JOB.pack())
    needed = {name: fields[name] for name in ("v", "id", "tenant", "model", "path", "body")}
    assert Job.unpack(msgpack.packb(needed)) == SMALL_JOB


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_major_version_is_refused(version: object) -> None:
    """The error names both versions and says what to do."""
    fields = msgpack.unpackb(SMALL_JOB.pack()) | {"v": version}
    with pytest.raises(UnsupportedVersion, match="reads version 1: upgrade it, or drain"):
        Job.unpack(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "no-id"), ("id", 7), ("tenant", ""), ("tenant", "a\nb"), ("model", "x" * 300), ("lane", "express"),
        ("band", 4), ("band", -1), ("band", True), ("stream", 1), ("ttl_ms", 0), ("max_attempts", 0), ("body", "text"),
        ("on_loss", "shrug"), ("on_loss", 3), ("path", b"/v1"), ("ttl_ms", 1.5),
        ("region", 5), ("region", "a\nb"), ("region", "x" * 101), ("remote_after_ms", -1), ("remote_after_ms", "500"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    """Whatever is wrong with an envelope, the error says which field."""
    fields = msgpack.unpackb(SMALL_JOB.pack()) | {field: value}
    with pytest.raises(BadMessage) as refused:
        Job.unpack(msgpack.packb(fields))
    assert field in refused.value.message


@pytest.mark.parametrize("field", ["id", "tenant", "model", "path", "body"])
def test_a_missing_field_is_named(field: str) -> None:
    """The five fields without which nothing can run."""
    fields = msgpack.unpackb(SMALL_JOB.pack())
    del fields[field]
    with pytest.raises(BadMessage, match=f"lacks {field}"):
        Job.unpack(msgpack.packb(fields))


@pytest.mark.parametrize("data", [b"", b"\x90", b"\x01", b"\xa1x"])
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    """An envelope is a map."""
    with pytest.raises(BadMessage):
        Job.unpack(data)


@pytest.mark.parametrize(
    "fields",
    [
        [JOB_ID, 1, "a", 0, 0], [JOB_ID, 1, "a", 0, 0, b"", 200], [JOB_ID, "1", "a", 0, 0, b""], [1, 1, "a", 0, 0, b""],
        [JOB_ID, 1, "a", 0, 0, "text"], [JOB_ID, 1, "a", 0, HEAD, b""], [JOB_ID, 1, "a", 0, 0, b"", 200, "x"],
        [JOB_ID, True, "a", 0, 0, b""], {"a": 1}, 5,
    ],
)  # fmt: skip
def test_a_malformed_frame_is_refused(fields: object) -> None:
    """Wrong count, wrong types, or a head without its status."""
    with pytest.raises(BadMessage):
        unpack_frames(msgpack.packb(fields))


@pytest.mark.parametrize(
    "data", [b"", b"requeued", b"requeued x", b"requeued x one two", b"exploded x 1 y", b"\xff\xfe"]
)
def test_a_malformed_marker_is_refused(data: bytes) -> None:
    """Text that is no marker."""
    with pytest.raises(BadMessage):
        unpack_marker(data)


def test_a_markers_reason_is_the_rest_of_the_text() -> None:
    """Spaces, and anything else, may stand in a reason; none is fine too."""
    marker = Marker(MarkerKind.DEAD, JOB_ID, 9, "it said: 500  (twice) ü")
    assert unpack_marker(marker.pack()) == marker
    assert unpack_marker(Marker(MarkerKind.DEAD, JOB_ID, 9, "").pack()).reason == ""


def test_unknown_control_messages_are_passed_over() -> None:
    """A newer Manager may say what we do not know; an abort without a job is an error."""
    assert parse_control({b"k": b"dance"}) is None
    assert parse_control({}) is None
    with pytest.raises(BadMessage):
        parse_control({b"k": b"abort"})
    with pytest.raises(BadMessage):
        parse_control({b"k": b"abort", b"job": b"\xff\xfe"})
