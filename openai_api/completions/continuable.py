"""Decides which answers may continue behind what was said of them, from the request's body: streams when their attempt
is lost, and background work and lines of batches that yield their slot.

A request qualifies only if every parameter is on a list of those that are known to mean the same for the rest of an
answer as for the whole of it, judged by what vLLM does with them. Everything unknown disqualifies. Excluded on purpose:

* penalties for presence and frequency: they count the answer so far, which as part of the prompt is no answer any more
  (``repetition_penalty`` counts prompt and answer alike, and so may stay);
* ``bad_words``: one of several tokens is known by those of it that the answer ends with, which as part of the prompt
  are not looked at;
* ``seed`` with a temperature: the draw would start over (running again with the same seed says the same text, which is
  compared);
* tools, response formats, grammars, reasoning options, ``logprobs``, several choices, ``echo``, ``suffix``, token ids
  as prompt, special tokens in the answer, options of the chat template: their state is not in the text.

Stop strings may stay because an engine holds back what may be the beginning of one: it is never delivered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..paths import CHAT_PATH, COMPLETIONS_PATH

_Check = Callable[[Any], bool]
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


def _any(_value: Any) -> bool:
    return True


def _only(*allowed: Any) -> _Check:
    # False is not 0 here: a wrong type is for the engine to refuse, in a first attempt.
    return lambda value: any(value is one or (type(value) is type(one) and value == one) for one in allowed)


def _plain_format(value: Any) -> bool:
    return isinstance(value, dict) and value == {"type": "text"}


def _ends_with_prompt(messages: Any) -> bool:
    """Whether the answer is a message of its own: one that continues the last message cannot be told from it later."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and isinstance(messages[-1], dict)
        and messages[-1].get("role") in ("user", "tool", "system", "developer")
    )


_COMMON: dict[str, _Check] = dict.fromkeys(
    (
        "model", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids",
        "user", "metadata", "store", "priority", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt",
        "request_id", "sim", "timeout",
    ),
    _any,
) | {
    "n": _only(1),
    "presence_penalty": _only(0, 0.0),
    "frequency_penalty": _only(0, 0.0),
    "seed": _any,  # together with the temperature, below
    "response_format": _plain_format,
    "skip_special_tokens": _only(True),
    "include_stop_str_in_output": _only(False),
}  # fmt: skip
_BY_PATH: Mapping[str, Mapping[str, _Check]] = {
    CHAT_PATH: _COMMON
    | {
        "messages": _ends_with_prompt,
        "max_completion_tokens": _any,
        "logprobs": _only(False),
        "tools": _only([]),
        "tool_choice": _only("none"),
    },
    COMPLETIONS_PATH: _COMMON
    | {"prompt": lambda prompt: isinstance(prompt, str), "best_of": _only(1), "echo": _only(False)},
}


def may_continue(path: str, request: Mapping[str, Any]) -> bool:
    """Whether a stream for ``request``, a parsed body, can safely continue behind a part of its answer."""
    checks = _BY_PATH.get(path)
    if checks is None:
        return False
    for name, value in request.items():
        if value is None:
            continue
        check = checks.get(name)
        if check is None or not check(value):
            return False
    return request.get("seed") is None or request.get("temperature") == 0


def may_yield(path: str, request: Mapping[str, Any]) -> bool:
    """Whether the answer to ``request``, a parsed body that asks for no stream, can be composed of streams, one behind
    the other (:mod:`openai_api.completions.whole_answer`)."""
    return not request.get("stream") and request.get("stream_options") is None and may_continue(path, request)


def keeps_numbers(body: bytes) -> bool:
    """Whether a body means the same once it was parsed and written anew: orjson turns an integer of more than 64 bits
    into a float."""
    return not _LONG_NUMBER.search(body)


def choices_of(request: Mapping[str, Any]) -> int:
    """How many choices a stream for ``request`` has: ``n`` for each prompt."""
    n, prompt, embeds = request.get("n"), request.get("prompt"), request.get("prompt_embeds")
    # A list of token ids is one prompt.
    prompts = len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1
    if isinstance(embeds, list):
        prompts = len(embeds) + (prompts if prompt else 0)
    return prompts * (n if type(n) is int else 1)
