"""The events of a response, from the frames of several attempts: persisted and live."""

from __future__ import annotations

import random
import string
import zlib
from dataclasses import replace
from typing import Any

import orjson
import pytest

from queue_schemas import (
    CONTINUED,
    END,
    HEAD,
    BodyTooLarge,
    Frame,
    JobId,
    Marker,
    MarkerKind,
    PathNotFound,
    StreamBroken,
)
from router.responses.live_merger import LiveResponseMerger
from router.responses.persisted_merger import PersistedResponseMerger
from router.responses.saved_request import load_request, save_request
from router.responses.schemas import ResponseRequest
from tests.support.responses import check_response, check_stream
from tests.support.sse import parse_events

JOB = JobId("0-" + "b" * 32)
REQUEST = ResponseRequest(JOB, 5, {"model": "m", "input": "hi"})


def _says(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return b"data: " + orjson.dumps({"object": "chat.completion.chunk", "choices": [choice]}) + b"\n\n"


def _frame(seq: int, data: bytes, epoch: int = 1, flags: int = 0) -> Frame:
    flags |= 0 if seq else HEAD
    return Frame(JOB, epoch, f"attempt{epoch}", seq, flags, data, 200, "text/event-stream")


def _whole(*texts: str, epoch: int = 1) -> list[Frame]:
    pieces = [_says(text) for text in texts] + [_says("", "stop") + b"data: [DONE]\n\n"]
    return [_frame(at, piece, epoch, END if at == len(pieces) - 1 else 0) for at, piece in enumerate(pieces)]


def _read(merger: PersistedResponseMerger, *items: Frame | Marker) -> list[dict[str, Any]]:
    for item in items:
        if isinstance(item, Frame):
            merger.on_frame(item)
        else:
            merger.on_marker(item)
    return parse_events(merger.take())


def _lost(epoch: int) -> Marker:
    return Marker(MarkerKind.REQUEUED, JOB, epoch, "it was lost")


WHOLE = _read(PersistedResponseMerger(REQUEST), *_whole("a", "b", "c"))


def test_all_events_come_from_the_first_to_the_end() -> None:
    """The answer may begin at once, before the engine says anything."""
    merger = PersistedResponseMerger(REQUEST)
    assert merger.head is not None
    assert [event["type"] for event in _read(merger)] == ["response.created", "response.queued"]
    assert check_stream(WHOLE).output_text == "abc"
    _read(merger, *_whole("a", "b", "c"))
    assert merger.ended
    assert merger.settled


@pytest.mark.parametrize("after", range(-1, len(WHOLE)))
def test_a_client_gets_the_events_behind_any_number(after: int) -> None:
    """Together they are the whole, wherever it was cut."""
    assert WHOLE[: after + 1] + _read(PersistedResponseMerger(REQUEST, after, 1), *_whole("a", "b", "c")) == WHOLE


@pytest.mark.parametrize("beyond", [0, 1, 99_999])
def test_a_number_behind_the_last_event_ends_with_an_error(beyond: int) -> None:
    """[H13] An empty stream would pass for the end of this response, of which the client has seen nothing."""
    merger = PersistedResponseMerger(REQUEST, len(WHOLE) + beyond, 1)
    assert _read(merger, *_whole("a", "b", "c")) == []
    assert isinstance(merger.error, StreamBroken)
    assert f"its last is {len(WHOLE) - 1}" in merger.error.message


def test_a_continued_attempt_continues_the_events() -> None:
    """The persisted output is one answer, and so are its events, for readers that saw the loss and those that did
    not."""
    goes_on = [_frame(0, _says("b"), 2, CONTINUED), _frame(1, _says("c"), 2), _whole("x", "y", epoch=2)[2]]
    frames = [_frame(0, _says("a")), *goes_on]
    assert _read(PersistedResponseMerger(REQUEST), *frames) == WHOLE
    assert _read(PersistedResponseMerger(REQUEST), frames[0], _lost(2), *goes_on) == WHOLE
    assert WHOLE[:5] + _read(PersistedResponseMerger(REQUEST, 4, 1), *frames) == WHOLE


@pytest.mark.parametrize("said", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_an_attempt_that_repeats_the_answer_is_not_noticed(said: list[str]) -> None:
    """Nothing comes twice, nothing is left out; even if the repeating attempt is lost in its turn."""
    first = _whole(*said)[:-1]
    assert _read(PersistedResponseMerger(REQUEST), *first, _lost(2), *_whole("a", "b", "c", epoch=2)) == WHOLE
    second = _whole("a", epoch=2)[:-1]
    assert _read(PersistedResponseMerger(REQUEST), *first, _lost(2), *second, *_whole("a", "b", "c", epoch=3)) == WHOLE


@pytest.mark.parametrize("anew", [["a", "x", "c"], ["ab", "c"], ["a"], []])
def test_an_attempt_that_differs_ends_the_stream(anew: list[str]) -> None:
    """Another text, other pieces (and so other numbers) or an earlier end: never spliced."""
    merger = PersistedResponseMerger(REQUEST)
    before = _read(merger, *_whole("a", "b", "c")[:2])
    assert before == WHOLE[: len(before)]
    after = _read(merger, *_whole(*anew, epoch=2))
    assert type(merger.error) is StreamBroken
    assert after == []


def test_an_answer_that_was_replaced_after_the_lookup_is_not_spliced() -> None:
    """A client with events of the replaced answer is told to begin again; one without gets the new answer."""
    merger = PersistedResponseMerger(REQUEST, 5, 1)
    assert _read(merger, *_whole("a", "b", "c", epoch=2)) == []
    assert type(merger.error) is StreamBroken
    assert _read(PersistedResponseMerger(REQUEST, 2, 1), *_whole("a", "b", "c", epoch=2)) == WHOLE[3:]


def test_output_that_is_read_from_its_beginning_again_gives_the_same_events() -> None:
    """If the queue has lost what was taken, the events continue where they were if the output is the same again."""
    merger = PersistedResponseMerger(REQUEST)
    events = _read(merger, *_whole("a", "b", "c")[:2])
    again = _whole("a", "b", "c", epoch=2)
    assert not merger.reread(2, "attempt2", again[1:])
    assert events + _read(merger, *again) == WHOLE


@pytest.mark.parametrize(
    ("kind", "status"),
    [(MarkerKind.CANCELLED, "cancelled"), (MarkerKind.DEAD, "failed"), (MarkerKind.EXPIRED, "failed")],
)
def test_an_end_without_an_answer_is_an_event(kind: MarkerKind, status: str) -> None:
    """The stream ends as a whole one, with the reason in the response; once."""
    merger = PersistedResponseMerger(REQUEST)
    marker = Marker(kind, JOB, 1, "somebody wanted that")
    events = _read(merger, _whole("a")[0], marker)
    response = check_stream(events)
    assert (response.status, merger.ended, merger.error) == (status, True, None)
    assert response.error is not None
    assert "somebody wanted that" in response.error.message
    assert _read(merger, marker, _whole("a")[1]) == []


def test_an_attempt_that_dies_before_it_repeated_all_ends_the_stream() -> None:
    """Its last event would have a number that the client has already."""
    merger = PersistedResponseMerger(REQUEST)
    _read(merger, *_whole("a", "b")[:-1], _lost(2), _whole("a", epoch=2)[0])
    assert _read(merger, Marker(MarkerKind.DEAD, JOB, 2, "it died")) == []
    assert type(merger.error) is StreamBroken


def _live(*, stream: bool) -> LiveResponseMerger:
    return LiveResponseMerger(REQUEST, stream=stream, replay_limit_bytes=1 << 20, on_loss="continue")


def test_a_foreground_response_streams_with_its_chat() -> None:
    """Each frame gives its events; a continued attempt leaves no trace."""
    live = _live(stream=True)
    live.on_frame(_whole("a", "b")[0])
    events = parse_events(live.take())
    assert live.head is not None
    assert live.head.is_event_stream
    assert events[-1]["delta"] == "a"
    live.on_marker(Marker(MarkerKind.LOST, JOB, 2, "it was lost"))
    assert live.continuation_prefix() == "a"
    for frame in [_frame(0, _says("b"), 2, CONTINUED), *[replace(f, seq=1) for f in _whole(epoch=2)[-1:]]]:
        live.on_frame(replace(frame, flags=frame.flags & ~HEAD if frame.seq else frame.flags))
    events += parse_events(live.take())
    assert check_stream(events).output_text == "ab"
    assert live.ended


def test_a_response_as_one_object_comes_at_its_end() -> None:
    """Nothing before, no head of a stream, and then all of it."""
    live = _live(stream=False)
    for frame in _whole("a", "b"):
        assert not live.ended
        live.on_frame(frame)
        data = live.take()
    assert not live.stream
    assert live.head is not None
    assert (live.head.status, live.head.content_type) == (200, "application/json")
    assert check_response(orjson.loads(data)).output_text == "ab"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_passes_as_it_is(stream: bool) -> None:
    """Its status and its error object are what the client's library understands."""
    live = _live(stream=stream)
    live.on_frame(Frame(JOB, 1, "a", 0, HEAD | END, b'{"error": {}}', 400, "application/json"))
    assert live.take() == b'{"error": {}}'
    assert live.head is not None
    assert live.head.status == 400


@pytest.mark.parametrize("said", ["", "half a"])
def test_a_response_whose_chat_fails_midway_is_an_error(said: str) -> None:
    """[H12] A client that waits for one object gets the error with its status: from a 200 SDKs read half a text as the
    answer."""
    live = _live(stream=False)
    body = orjson.dumps({"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}})
    live.on_frame(_whole(said)[0])
    live.on_frame(replace(_frame(0, b"data: " + body + b"\n\n"), seq=1, flags=END))
    data = live.take()
    assert live.ended and live.head is not None
    assert (live.head.status >= 500, live.head.content_type) == (True, "application/json")
    assert orjson.loads(data)["error"]["message"] == "boom"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_does_not_stream_is_understood(stream: bool) -> None:
    """Its whole answer takes the form that the client asked for."""
    body = orjson.dumps({"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]})
    live = _live(stream=stream)
    live.on_frame(Frame(JOB, 1, "a", 0, HEAD | END, body, 200, "application/json"))
    data = live.take()
    response = check_stream(parse_events(data)) if stream else check_response(orjson.loads(data))
    assert response.output_text == "hi"


@pytest.mark.parametrize(("size", "kept"), [(10, True), (400_000, False)])
def test_a_request_is_loaded_from_the_note_of_its_job(size: int, kept: bool) -> None:
    """An input that does not fit is left out; everything else must fit."""
    text = "".join(random.Random(1).choices(string.printable, k=size))
    request = {"model": "m", "input": text, "metadata": {"a": "b"}}
    loaded = load_request(JOB, save_request(7, request))
    assert (loaded.job_id, loaded.created_at, loaded.body.get("input")) == (JOB, 7, text if kept else None)
    assert loaded.body["metadata"] == {"a": "b"}
    if not kept:
        with pytest.raises(BodyTooLarge, match="send long texts as input"):
            save_request(7, {"model": "m", "input": "x", "instructions": text})
    for strange in (b"", b"mine", zlib.compress(b"[]"), zlib.compress(b'{"created_at": 1}')):
        with pytest.raises(PathNotFound):
            load_request(JOB, strange)
