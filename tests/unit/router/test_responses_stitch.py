"""The events of a kept response, from the frames of several attempts."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from queue_schemas import CONTINUED, END, HEAD, Frame, JobId, Marker, MarkerKind, StreamBroken
from router.core.responses import Asked, ResponseStitch
from tests.support.responses import check_stream, server_sent

JOB = JobId("0-" + "b" * 32)
ASKED = Asked(JOB, 5, {"model": "m", "input": "hi"})


def _says(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


def _frame(seq: int, data: bytes, epoch: int = 1, flags: int = 0) -> Frame:
    flags |= 0 if seq else HEAD
    return Frame(JOB, epoch, f"attempt{epoch}", seq, flags, data, 200, "text/event-stream")


def _whole(*texts: str, epoch: int = 1) -> list[Frame]:
    pieces = [_says(text) for text in texts] + [_says("", "stop") + b"data: [DONE]\n\n"]
    return [_frame(at, piece, epoch, END if at == len(pieces) - 1 else 0) for at, piece in enumerate(pieces)]


def _read(stitch: ResponseStitch, *items: Frame | Marker) -> list[dict[str, Any]]:
    for item in items:
        if isinstance(item, Frame):
            stitch.on_frame(item)
        else:
            stitch.on_marker(item)
    return server_sent(stitch.take())


def _lost(epoch: int) -> Marker:
    return Marker(MarkerKind.REQUEUED, JOB, epoch, "it was lost")


WHOLE = _read(ResponseStitch(ASKED), *_whole("a", "b", "c"))


def test_all_events_come_from_the_first_to_the_end() -> None:
    """The answer may begin at once, before anything is said."""
    stitch = ResponseStitch(ASKED)
    assert stitch.head is not None
    assert [event["type"] for event in _read(stitch)] == ["response.created", "response.queued"]
    assert check_stream(WHOLE).output_text == "abc"
    _read(stitch, *_whole("a", "b", "c"))
    assert stitch.ended
    assert stitch.settled


@pytest.mark.parametrize("after", range(-1, len(WHOLE) + 1))
def test_whatever_the_client_has_it_gets_the_rest(after: int) -> None:
    """Together they are the whole, wherever it was cut."""
    assert WHOLE[: after + 1] + _read(ResponseStitch(ASKED, after), *_whole("a", "b", "c")) == WHOLE


def test_an_attempt_that_goes_on_goes_on() -> None:
    """What is kept is one answer, and so are its events, for who saw the loss and for who did not."""
    goes_on = [_frame(0, _says("b"), 2, CONTINUED), _frame(1, _says("c"), 2), _whole("x", "y", epoch=2)[2]]
    frames = [_frame(0, _says("a")), *goes_on]
    assert _read(ResponseStitch(ASKED), *frames) == WHOLE
    assert _read(ResponseStitch(ASKED), frames[0], _lost(2), *goes_on) == WHOLE
    assert WHOLE[:5] + _read(ResponseStitch(ASKED, 4, 1), *frames) == WHOLE


@pytest.mark.parametrize("said", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_an_attempt_that_says_the_same_anew_is_not_noticed(said: list[str]) -> None:
    """Nothing comes twice, nothing is left out; even when the repeating attempt is lost in its turn."""
    first = _whole(*said)[:-1]
    assert _read(ResponseStitch(ASKED), *first, _lost(2), *_whole("a", "b", "c", epoch=2)) == WHOLE
    second = _whole("a", epoch=2)[:-1]
    assert _read(ResponseStitch(ASKED), *first, _lost(2), *second, *_whole("a", "b", "c", epoch=3)) == WHOLE


@pytest.mark.parametrize("anew", [["a", "x", "c"], ["ab", "c"], ["a"], []])
def test_an_attempt_that_says_something_else_ends_the_stream(anew: list[str]) -> None:
    """Other words, other pieces (and so other numbers) or an earlier end: never spliced."""
    stitch = ResponseStitch(ASKED)
    before = _read(stitch, *_whole("a", "b", "c")[:2])
    assert before == WHOLE[: len(before)]
    after = _read(stitch, *_whole(*anew, epoch=2))
    assert type(stitch.error) is StreamBroken
    assert after == []


def test_an_answer_that_began_after_the_look_is_not_spliced_behind_an_earlier_one() -> None:
    """Who has events of an answer that was replaced meanwhile is told to begin again; who has none gets the new one."""
    stitch = ResponseStitch(ASKED, 5, 1)
    assert _read(stitch, *_whole("a", "b", "c", epoch=2)) == []
    assert type(stitch.error) is StreamBroken
    assert _read(ResponseStitch(ASKED, 2, 1), *_whole("a", "b", "c", epoch=2)) == WHOLE[3:]


def test_what_is_read_again_from_its_beginning_is_the_same() -> None:
    """When the queue has lost what was taken, the events go on where they were if it says the same again."""
    stitch = ResponseStitch(ASKED)
    events = _read(stitch, *_whole("a", "b", "c")[:2])
    again = _whole("a", "b", "c", epoch=2)
    assert not stitch.reread(2, "attempt2", again[1:])
    assert events + _read(stitch, *again) == WHOLE


@pytest.mark.parametrize(
    ("kind", "status"),
    [(MarkerKind.CANCELLED, "cancelled"), (MarkerKind.DEAD, "failed"), (MarkerKind.EXPIRED, "failed")],
)
def test_an_end_without_an_answer_is_an_event(kind: MarkerKind, status: str) -> None:
    """The stream ends as one that is whole, and says why in the response; once."""
    stitch = ResponseStitch(ASKED)
    marker = Marker(kind, JOB, 1, "somebody wanted that")
    events = _read(stitch, _whole("a")[0], marker)
    response = check_stream(events)
    assert (response.status, stitch.ended, stitch.error) == (status, True, None)
    assert response.error is not None
    assert "somebody wanted that" in response.error.message
    assert _read(stitch, marker, _whole("a")[1]) == []


def test_an_attempt_that_dies_before_it_repeated_all_ends_the_stream() -> None:
    """Its last event would have a number that the client has already."""
    stitch = ResponseStitch(ASKED)
    _read(stitch, *_whole("a", "b")[:-1], _lost(2), _whole("a", epoch=2)[0])
    assert _read(stitch, Marker(MarkerKind.DEAD, JOB, 2, "it died")) == []
    assert type(stitch.error) is StreamBroken
