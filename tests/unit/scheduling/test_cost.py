"""What requests cost, before and after they run."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from queue_schemas.job import MAX_COST
from scheduling.cost import (
    MAX_OUTPUT,
    MEDIA_TOKENS,
    OUTPUT_WEIGHT,
    USUAL_OUTPUT,
    Usage,
    cost_of,
    estimate_cost,
)

CHAT = "/v1/chat/completions"


def estimate(path: str = CHAT, **request: Any) -> int:
    return estimate_cost(path, json.dumps(request).encode(), request)


def chat(words: str, **fields: Any) -> int:
    return estimate(messages=[{"role": "user", "content": words}], **fields)


def test_a_longer_prompt_costs_more_by_about_a_token_for_four_bytes() -> None:
    assert chat("word" * 1_000, max_tokens=10) - chat("", max_tokens=10) == 1_000


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_output_is_what_the_request_allows(limit: str) -> None:
    """Up to a bound beyond which nobody means it."""
    bare = chat("x", **{limit: 1})
    assert abs(chat("x", **{limit: 101}) - bare - 100 * OUTPUT_WEIGHT) <= 1
    assert chat("x", **{limit: 10**18}) - bare <= MAX_OUTPUT * OUTPUT_WEIGHT + 5


@pytest.mark.parametrize("wrong", [None, "many", True, [], -5, 1.5])
def test_a_wrong_limit_is_no_harm(wrong: Any) -> None:
    assert 1 <= chat("x", max_tokens=wrong) <= OUTPUT_WEIGHT * USUAL_OUTPUT + 40


def test_several_answers_cost_several_times_the_output() -> None:
    one = chat("x", max_tokens=100)
    assert abs(chat("x", max_tokens=100, n=3) - one - 400) <= 3
    prompts = estimate("/v1/completions", prompt=["a", "b", "c"], max_tokens=100)
    assert prompts >= 3 * 100 * OUTPUT_WEIGHT


def test_what_writes_nothing_costs_its_prompt() -> None:
    assert estimate("/v1/embeddings", input="word" * 100) <= 110


def test_media_count_flat_however_large_they_are() -> None:
    """And the text beside them as text."""

    def with_image(size: int, words: str) -> int:
        image = "data:image/png;base64," + base64.b64encode(b"x" * size).decode()
        parts = [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": image}}]
        return estimate(messages=[{"role": "user", "content": parts}], max_tokens=1)

    assert with_image(3_000_000, "x") == with_image(3_000, "x")
    assert MEDIA_TOKENS < with_image(3_000, "x") < MEDIA_TOKENS + 50
    assert with_image(3_000, "word " * 401) - with_image(3_000, "word ") == 500


def test_usage_is_weighted_and_cached_tokens_cost_a_tenth() -> None:
    assert cost_of(Usage(1_000, 100)) == 1_200
    assert cost_of(Usage(1_000, 100, cached=900)) == 100 + 90 + 200
    assert cost_of(Usage(10, 0, cached=1_000)) == 1
    assert cost_of(Usage(10**9, 10**9)) == MAX_COST
    assert cost_of(Usage(0, 0)) == 1


def test_a_request_of_very_many_values_is_guessed_by_its_bytes() -> None:
    """Four million numbers beside the word base64 took a second in which a Router served nobody."""
    request = {"model": "m", "note": "base64", "messages": [1] * 1_000_000}
    body = json.dumps(request).encode()
    began = time.process_time()
    assert estimate_cost("/v1/embeddings", body, request) == len(body) // 4
    assert time.process_time() - began < 0.1
