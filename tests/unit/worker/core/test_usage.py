"""The usage that a worker reads in answers."""

from __future__ import annotations

import pytest

from worker.core import AnswerUsage, read_usage

OPENAI = b'{"usage":{"prompt_tokens":700,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":600}}}'
ANTHROPIC = b'data: {"usage":{"input_tokens":700,"cache_read_input_tokens":600,"output_tokens":5}}'


@pytest.mark.parametrize("end", [OPENAI, ANTHROPIC, b"x" * 10_000 + OPENAI])
def test_the_engines_figures_are_read(end: bytes) -> None:
    """Of either API, cached tokens too."""
    usage = read_usage(end, 9)
    assert usage == AnswerUsage(700, 5, 600)
    assert usage.cost(b"") == 100 + 60 + 10


@pytest.mark.parametrize("absurd", [b"-5", b"1000000000000000000", b"1e18", b'"5"', b"null", b"5.5", b"99999999"])
def test_an_absurd_figure_is_none(absurd: bytes) -> None:
    """The events of a stream count instead, and the bytes of the prompt."""
    end = b'{"usage": {"prompt_tokens": %b, "completion_tokens": %b, "cached_tokens": %b}}' % (absurd, absurd, absurd)
    assert read_usage(end) == AnswerUsage(None, None, 0)
    assert read_usage(end).cost(b"") is None
    assert read_usage(end, 9).cost(b"word" * 10) == 10 + 18
