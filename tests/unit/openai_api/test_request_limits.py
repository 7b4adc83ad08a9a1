"""How much one request may ask of an engine."""

from __future__ import annotations

from typing import Any

import pytest

from openai_api.request_limits import RequestLimits, check_request
from queue_schemas import BadRequest

LIMITS = RequestLimits(choices=4, entries=10, logprobs=5, tokens=100)


def check(fields: dict[str, Any], path: str = "/v1/completions", limits: RequestLimits = LIMITS) -> None:
    check_request(fields, path, limits)


@pytest.mark.parametrize(
    ("fields", "param", "setting"),
    [
        ({"n": 100_000}, "n", "max_choices"),
        ({"n": "100000"}, "n", "max_choices"),
        ({"n": 1e5}, "n", "max_choices"),
        ({"n": float("nan")}, "n", "max_choices"),
        ({"best_of": 5}, "best_of", "max_choices"),
        ({"logprobs": 6}, "logprobs", "max_logprobs"),
        ({"top_logprobs": 6}, "top_logprobs", "max_logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs", "max_logprobs"),
        ({"max_tokens": 101}, "max_tokens", "max_output_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "max_output_tokens"),
        ({"max_output_tokens": "101"}, "max_output_tokens", "max_output_tokens"),
        ({"prompt": ["a"] * 11}, "prompt", "max_entries"),
        ({"prompt": [[1]] * 11}, "prompt", "max_entries"),
        ({"input": ["a"] * 11}, "input", "max_entries"),
        ({"documents": ["a"] * 11}, "documents", "max_entries"),
        ({"documents": {"content": [{}] * 11}}, "documents", "max_entries"),
        ({"text_2": ["a"] * 11}, "text_2", "max_entries"),
        ({"stop": ["a"] * 11}, "stop", "max_entries"),
        ({"logit_bias": {str(token): 1 for token in range(11)}}, "logit_bias", "max_entries"),
        ({"messages": [[{}]] * 11}, "messages", "max_entries"),
        ({"prompt": ["a"] * 3, "n": 4}, "n", "max_entries"),
        ({"sampling_params": {"n": 100}}, "n", "max_choices"),
    ],
)
def test_too_much_is_refused_with_its_limit(fields: dict[str, Any], param: str, setting: str) -> None:
    """[E2] The field, the bound and the setting are named, also for numbers written as text, which engines read."""
    with pytest.raises(BadRequest, match=setting) as refused:
        check(fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 4, "best_of": 4, "logprobs": True, "top_logprobs": 5, "max_tokens": 100, "prompt": "x"},
        {"prompt": list(range(1000))},
        {"prompt": [list(range(1000))] * 10},
        {"messages": [{}] * 100},
        {"n": None, "stop": None, "max_tokens": None},
        {"n": "many", "prompt": {}},
    ],
)
def test_what_is_within_the_limits_passes(fields: dict[str, Any]) -> None:
    """[E2] A list of token ids is one prompt, a conversation as long as it is; wrong types are for engines to
    refuse."""
    check(fields)


def test_a_response_has_as_many_items_as_its_conversation() -> None:
    """[E2] The input of a response is a conversation, not a list of requests."""
    check({"input": [{"role": "user", "content": "x"}] * 100}, "/v1/responses")
