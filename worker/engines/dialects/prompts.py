"""Prove that an engine reads a prefix behind the original prompt: read its answers, and compare the two prompts.

The dialects use it to plan a continuation. Everything raises ``NotContinuable`` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from queue_schemas import Job

from ...core.continuation import Continuation, ContinuationRules, continue_request, differing_tokens, prompt_requests
from .port import Ask, NotContinuable, Reply


async def plan_by_tokens(
    job: Job, ask: Ask, rules: ContinuationRules, *, text_field: str, detokenize: Mapping[str, object]
) -> Continuation:
    """Of an engine whose ``/tokenize`` takes a prompt or messages: the tokens of both prompts are turned back into text
    by ``/detokenize``, which gets the fields ``detokenize`` too and answers with ``text_field``."""
    requests = prompt_requests(job, rules)
    original, continued = [_token_ids(await ask_fields(ask, "/tokenize", request)) for request in requests]
    before, behind = [
        text_of(await ask_fields(ask, "/detokenize", {"model": job.model, "tokens": tokens, **detokenize}), text_field)
        for tokens in differing_tokens(original, continued)
    ]
    check_texts(job, before, behind)
    return plan_of(job, rules, len(original), len(continued))


def check_texts(job: Job, before: str, behind: str) -> None:
    """Raise unless ``behind`` is ``before`` and then the prefix, to the letter."""
    if behind != before + job.prefix:
        raise NotContinuable("its prompt would not be the original one and what was delivered")


def plan_of(job: Job, rules: ContinuationRules, original: int, continued: int) -> Continuation:
    """The plan for prompts of so many tokens."""
    if continued < original:
        raise NotContinuable("its prompt would get shorter by what was delivered")
    return continue_request(job, original, continued - original, rules)


async def ask_fields(ask: Ask, path: str, request: Mapping[str, object]) -> dict[str, Any]:
    """The object that ``path`` answers."""
    answered = read_json(path, await ask(path, request))
    if type(answered) is not dict:
        raise NotContinuable(f"its {path} does not answer with an object")
    return answered


def read_json(path: str, reply: Reply) -> Any:
    """The JSON of a reply that passes for a success."""
    if reply.status != 200:
        raise NotContinuable(f"its {path} answers {reply.status}")
    try:
        return orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        raise NotContinuable(f"its {path} does not answer with JSON") from None


def text_of(answer: Mapping[str, Any], name: str) -> str:
    """The text in field ``name``."""
    text = answer.get(name)
    if type(text) is not str:
        raise NotContinuable(f"it answers something else than a text as {name}")
    return text


def _token_ids(answer: Mapping[str, Any]) -> list[int]:
    tokens = answer.get("tokens")
    if type(tokens) is not list or not all(type(token) is int for token in tokens):
        raise NotContinuable("its /tokenize answers something else than tokens")
    return tokens
