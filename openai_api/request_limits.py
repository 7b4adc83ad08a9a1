"""Limits on one request: how many choices, entries, log probabilities and tokens it may ask for, and which media.

The Router checks requests, the batcher the lines of batches, both by :func:`check_request`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from queue_schemas.errors import BadRequest

from .media import MediaHosts, check_media
from .paths import RESPONSES_PATH

_CHOICES = frozenset({"n", "best_of"})
_LOGPROBS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})
_TOKENS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"})
_PROMPTS = frozenset({"prompt", "prompt_embeds", "input", "inputs"})
_LISTS = frozenset(
    {
        "documents", "queries", "query", "texts", "images", "text_1", "text_2", "data_1", "data_2", "stop",
        "stop_sequences", "stop_token_ids", "bad_words", "logit_bias",
    }
)  # fmt: skip
_CHECKED = _CHOICES | _LOGPROBS | _TOKENS | _PROMPTS | _LISTS | {"messages", "sampling_params"}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """``choices`` of one prompt, ``entries`` of one list and sequences in all, ``logprobs`` for each token. ``tokens``
    of one answer; 0: as many as the model has."""

    choices: int = 128
    entries: int = 2_048
    logprobs: int = 20
    tokens: int = 0
    media: MediaHosts = field(default_factory=MediaHosts)


def check_request(request: Mapping[str, Any], path: str, limits: RequestLimits) -> None:
    """Refuse with ``BadRequest``, which names the field and the setting, a ``request`` for ``path``, a parsed
    body, that asks for more than ``limits``."""
    _check_amounts(request, path, limits)
    check_media(request, limits.media)


def _check_amounts(request: Mapping[str, Any], path: str, limits: RequestLimits) -> None:
    prompts, choices = 1, 1.0
    for name, value in request.items():
        if name not in _CHECKED:
            continue
        if name in _CHOICES:
            choices = max(choices, _bounded(name, value, limits.choices, "max_choices"))
        elif name in _LOGPROBS:
            _bounded(name, value, limits.logprobs, "max_logprobs")
        elif name in _TOKENS and limits.tokens:
            _bounded(name, value, limits.tokens, "max_output_tokens")
        elif name in _PROMPTS and not (path == RESPONSES_PATH and name == "input"):
            prompts = max(prompts, _entries(name, value, limits.entries))
        elif name in _LISTS:
            _entries(name, value, limits.entries)
        elif name == "messages" and type(value) is list and value and type(value[0]) is list:
            prompts = max(prompts, _entries(name, value, limits.entries))
        elif name == "sampling_params" and type(value) is dict:
            _check_amounts(value, path, limits)
    if prompts * choices > limits.entries:
        raise BadRequest(
            f"{prompts} prompts of {choices:g} choices each are more than the {limits.entries} answers that one "
            "request may have: split it, or have the operator raise max_entries",
            param="n",
        )


def _bounded(name: str, value: object, most: int, setting: str) -> float:
    """The number that an engine reads in ``value``: some take it from text, too."""
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            return 1.0
    if type(value) is not int and type(value) is not float:
        return 1.0
    if not value <= most:
        raise BadRequest(
            f"{name} is {value:.12g}, more than the {most} that a request may ask for here: ask for less, or have the "
            f"operator raise {setting} (INFERQ_{setting.upper()}, or tenant_limits for one tenant)",
            param=name,
        )
    return float(value)


def _entries(name: str, value: Any, most: int) -> int:
    """How many prompts, documents or words a field lists. A list of token ids is one prompt."""
    if type(value) is dict:
        value = value.get("content", value)
    if type(value) is not list and type(value) is not dict:
        return 1
    if name in _PROMPTS and value and type(value) is list and type(value[0]) is int:
        return 1
    if len(value) > most:
        raise BadRequest(
            f"{name} has {len(value)} entries, more than the {most} of one request: split it into several, or have the "
            "operator raise max_entries (INFERQ_MAX_ENTRIES, or tenant_limits for one tenant)",
            param=name,
        )
    return len(value)
