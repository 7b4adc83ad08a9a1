"""Which streams an engine has forgotten while it serves others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.queue import make_job
from worker.core import StreamStall, may_buffer


def test_a_stream_that_stands_still_while_others_go_on_is_stalled() -> None:
    """Not before something came of others a whole limit after the last of it."""
    stream = StreamStall(pieces=3, reading=True)
    assert not any(stream.is_stalled(float(second), float(second), 10.0) for second in range(1, 11))
    assert not stream.is_stalled(10.9, 10.9, 10.0)
    assert stream.is_stalled(11.0, 11.0, 10.0)


def test_a_stream_that_goes_on_is_not_stalled() -> None:
    """Every piece begins its time anew."""
    stream = StreamStall(reading=True)
    for second in range(40):
        if second % 9 == 0:
            stream.pieces += 1
        assert not stream.is_stalled(float(second), float(second), 10.0)


def test_silence_with_no_other_stream_is_the_engines() -> None:
    """Perhaps all of it stalls, perhaps a parser buffers its output: this stream alone is not to blame."""
    stream = StreamStall(pieces=1, reading=True)
    assert not any(stream.is_stalled(float(second), 1.0, 10.0) for second in range(1, 100))


def test_what_has_not_begun_is_not_stalled() -> None:
    """A long prompt and a plain answer are silent by nature."""
    stream = StreamStall(reading=True)
    assert not any(stream.is_stalled(float(second), float(second), 10.0) for second in range(100))


def test_time_in_which_no_client_reads_is_not_the_engines_silence() -> None:
    """A slow Router makes the worker wait, not the engine."""
    stream = StreamStall(pieces=1)
    assert not any(stream.is_stalled(float(second), float(second), 10.0) for second in range(50))
    stream.reading = True
    assert not any(stream.is_stalled(float(second), float(second), 10.0) for second in range(50, 59))
    assert stream.is_stalled(60.0, 60.0, 10.0)


def test_time_without_checks_is_not_the_engines_silence() -> None:
    """Worker and engine were suspended: a stream whose next piece comes a moment after the others' is not forgotten."""
    stream = StreamStall(pieces=3, reading=True)
    assert not stream.is_stalled(1.0, 1.0, 10.0)
    assert not any(stream.is_stalled(float(second), float(second), 10.0) for second in range(200, 210))
    assert stream.is_stalled(210.0, 210.0, 10.0)


@pytest.mark.parametrize(
    ("asked", "buffers"),
    [
        ({}, False),
        ({"temperature": 1, "stop": ["x"], "n": 2, "tools": None}, False),
        ({"tools": [{"type": "function"}]}, True),
        ({"tool_choice": "auto"}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a"}}, True),
        ({"include_reasoning": False}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
)
def test_engines_may_buffer_all_but_plain_text(asked: dict[str, Any], buffers: bool) -> None:
    """[C5] Parsers of tools, formats and thoughts wait for the whole of what they parse."""
    body = json.dumps({"model": "m", "messages": []} | asked).encode()
    assert may_buffer(make_job(body=body)) is buffers
    assert may_buffer(make_job(body=body, path="/v1/responses"))
    assert may_buffer(make_job(body=b"--form", path="/v1/completions"))


def test_a_first_piece_may_be_sent_before_the_prompt_is_read() -> None:
    """[C5] Some engines send the role at once: the long silence of a long prompt comes behind it."""
    assert StreamStall(pieces=1).has_only_begun
    assert not StreamStall(pieces=2).has_only_begun
