"""Streams of engines in every form that servers write: what clients read of each, however its bytes arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openai_api.sse import MAX_EVENT_BYTES
from queue_schemas import END, Lease, unpack_frames
from router.inference.merging.attempt_merger import AttemptMerger
from tests.support.queue import make_job
from worker.core import FrameCutter

FOLDER = Path(__file__).parents[3] / "fixtures" / "sse"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text("utf-8"))
SMALL = ("lf", "no_done_usage", "completions", "messages", "responses_completed", "error_closed", "both_choices")
Event = tuple[str, str]


def passed_on(case: dict[str, Any], *pieces: bytes) -> tuple[bytes, bool]:
    """What a client gets of an answer that arrives in ``pieces``, and whether it counts as whole."""
    body = json.dumps({"model": "m", **case.get("body", {})}).encode()
    cutter = FrameCutter(Lease(make_job(path=case["path"], body=body, stream=True), 1, "attempt", 1, 1_000, 5))
    cutter.head(200, "text/event-stream")
    packed = [frame for piece in pieces if (frame := cutter.feed(piece))]
    last = cutter.finish(delimited=case["delimited"])
    merger = AttemptMerger(stream=True, replay_limit_bytes=1 << 24)
    for frame in unpack_frames(b"".join([*packed, last or b""])):
        merger.on_frame(frame)
    assert merger.ended == (last is not None)
    return merger.take(), last is not None


def read(stream: bytes) -> list[Event]:
    """Name and data of each event, by the HTML standard ("Interpreting an event stream"); LF is the only line end."""
    events: list[Event] = []
    name, data = "", list[str]()
    for line in stream.decode("utf-8", "replace").split("\n"):
        if not line:
            if data:
                events.append((name, "\n".join(data)))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
    return events


def expected(case: dict[str, Any]) -> list[Event]:
    return [(name, data) for name, data in case["events"]]


def test_every_file_has_its_expected_result() -> None:
    """Neither a stream without an expectation nor the reverse."""
    assert {path.stem for path in FOLDER.glob("*.sse")} == CASES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_stream_is_read_the_same_however_its_bytes_arrive(name: str) -> None:
    """[C3] Every form that the standard allows is read as it was meant, and what was cut short is never whole."""
    case, stream = CASES[name], (FOLDER / f"{name}.sse").read_bytes()
    splits = [(stream[:at], stream[at:]) for at in range(len(stream))]
    for pieces in [(stream,), tuple(stream[at : at + 1] for at in range(len(stream))), *splits]:
        given, whole = passed_on(case, *(piece for piece in pieces if piece))
        assert (read(given), whole) == (expected(case), case["whole"]), pieces
        assert b"\r" not in given
        assert not given.startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("delimited", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_stream_cut_at_any_byte_is_lost_or_whole(name: str, delimited: bool) -> None:
    """[C3] Wherever an engine stops, the client gets all of the answer, or the attempt is lost."""
    case = CASES[name] | {"delimited": delimited}
    stream = (FOLDER / f"{name}.sse").read_bytes()
    said = [event for event in expected(case) if event[1] != "[DONE]"]
    wholes = 0
    for at in range(len(stream)):
        given, whole = passed_on(case, *([stream[:at]] if at else ()))
        got = [event for event in read(given) if event[1] != "[DONE]"]
        wholes += whole
        assert got == (said if whole else said[: len(got)])
    assert wholes < 60, "only what follows the last words may be missing"


def test_an_event_that_is_too_long_to_hold_is_whole_only_if_it_is_delimited() -> None:
    """[C3] Most of it has left before its end is seen: a closed connection then proves nothing."""
    last = {"type": "response.completed", "response": {"output": "x" * (2 * MAX_EVENT_BYTES)}}
    stream = b"event: response.completed\ndata: " + json.dumps(last).encode() + b"\n\n"
    case = CASES["responses_completed"]
    pieces = [stream[at : at + 65_536] for at in range(0, len(stream), 65_536)]
    assert passed_on(case, *pieces) == (stream, True)
    for cut in (pieces[:-1], [*pieces[:-1], pieces[-1][:-10]]):
        assert not passed_on(case | {"delimited": False}, *cut)[1]


def test_the_last_frame_ends_the_answer() -> None:
    """Whatever was added to a stream travels in the frame that ends it."""
    cutter = FrameCutter(Lease(make_job(), 1, "attempt", 1, 1_000, 5))
    cutter.head(200, "text/event-stream")
    (frame,) = unpack_frames(cutter.finish(delimited=True) or cutter.end())
    assert frame.flags & END
