"""Continue a stream where an earlier attempt stopped: the request to the engine, and the usage of the whole answer.

Rules:

* The engine is asked for what follows the prefix: behind the assistant's last message of a chat, in the engine's own
  words (:class:`ContinuationRules`), or behind the prompt of a completion.
* That is right only if the engine really reads the prefix there. Chat templates may strip it, put something behind it,
  or something else in front of it than they put in front of an answer (a beginning of thoughts, say). So the engine is
  asked for both prompts: the longer one's text must be the original prompt's and then the prefix, to the letter. How it
  is asked is its dialect's matter (:mod:`worker.engines.dialects`).
* The client gets the usage of one answer. The tokens said so far are those by which the longer prompt exceeds
  the original one; limits are lowered by them, and ``usage`` is put right.

Which requests may be continued at all is decided by the Router (:mod:`openai_api.completions.continuable`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from openai_api.paths import CHAT_PATH, wants_usage
from openai_api.sse import DONE_EVENT, encode_json, end_of_events
from queue_schemas import Job

_MARGIN_TOKENS = 8
"""Tokens that both prompts have which are turned back into text with those that they have not: the cut may lie within a
character."""


@dataclass(frozen=True, slots=True)
class ContinuationRules:
    """How an engine is told to go on. ``chat_fields``: of a chat whose last message is the beginning of its answer.
    ``completion_tokens``: what a completion without ``max_tokens`` may say; None: as much as the context holds."""

    chat_fields: Mapping[str, object]
    completion_tokens: int | None = 16
    """The default of the OpenAI API, which vLLM and SGLang keep; a chat may fill the context."""


Request = dict[str, Any]


def prompt_requests(job: Job, rules: ContinuationRules) -> tuple[Request, Request]:
    """What says the original prompt of ``job`` to an engine, and what says the one with the prefix: the model, and
    ``prompt`` or ``messages``."""
    request = orjson.loads(job.body)
    base = {"model": request["model"]}
    if job.path != CHAT_PATH:
        prompt = request["prompt"]
        return base | {"prompt": prompt}, base | {"prompt": prompt + job.prefix}
    return base | {"messages": request["messages"]}, base | _continued_chat(request, job.prefix, rules)


def differing_tokens(original: list[int], continued: list[int]) -> tuple[list[int], list[int]]:
    """The ends of two prompts from a little before where they differ: their texts must be equal but for the prefix."""
    same = next(
        (place for place, (one, other) in enumerate(zip(original, continued, strict=False)) if one != other),
        min(len(original), len(continued)),
    )
    start = max(same - _MARGIN_TOKENS, 0)
    return original[start:], continued[start:]


def continue_request(job: Job, prompt_tokens: int, said_tokens: int, rules: ContinuationRules) -> Continuation:
    """The request for the rest of the answer. ``prompt_tokens`` are the original prompt's, ``said_tokens`` those of the
    prefix."""
    request = orjson.loads(job.body)
    if job.path == CHAT_PATH:
        request |= _continued_chat(request, job.prefix, rules)
    else:
        request["prompt"] += job.prefix
        if request.get("max_tokens") is None and rules.completion_tokens is not None:
            request["max_tokens"] = rules.completion_tokens
    exhausted = False
    for name in ("max_tokens", "max_completion_tokens"):
        if type(request.get(name)) is int:
            request[name] -= said_tokens
            exhausted = exhausted or request[name] <= 0
    if type(request.get("min_tokens")) is int:
        request["min_tokens"] = max(request["min_tokens"] - said_tokens, 0)
    return Continuation(job, None if exhausted else orjson.dumps(request), prompt_tokens, said_tokens)


def _continued_chat(request: Request, prefix: str, rules: ContinuationRules) -> Request:
    return {"messages": [*request["messages"], {"role": "assistant", "content": prefix}], **rules.chat_fields}


class Continuation:
    """One continued attempt. ``body`` is its request; None if the limit on tokens leaves nothing to say.
    ``said_tokens`` are those of the prefix.

    Feed the engine's bytes to :meth:`feed`: events that tell the usage come out with that of the whole answer.
    """

    def __init__(self, job: Job, body: bytes | None, prompt_tokens: int, said_tokens: int) -> None:
        self.body = body
        self._job = job
        self._prompt_tokens = prompt_tokens
        self.said_tokens = said_tokens
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """What to pass on of the answer's next bytes; what follows the last whole event waits for the rest of it."""
        known = len(self._tail)
        data = self._tail + data
        border = end_of_events(data, known)
        self._tail = data[border:]
        whole = data[:border]
        if b'"usage"' not in whole:
            return whole
        events = whole.replace(b"\r\n", b"\n").split(b"\n\n")
        return b"\n\n".join(self._with_usage(event) if b'"usage"' in event else event for event in events)

    def end(self) -> bytes:
        """What was left when the answer ended."""
        tail, self._tail = self._tail, b""
        return tail

    def ending(self, created: int) -> bytes:
        """The end of an answer, made at ``created`` (s), whose limit on tokens was reached by what had been said."""
        chat = self._job.path == CHAT_PATH
        base: dict[str, Any] = {
            "id": self._job.id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": created,
            "model": self._job.model,
        }
        said: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        chunks = [base | {"choices": [{"index": 0, **said, "finish_reason": "length"}]}]
        if wants_usage(orjson.loads(self._job.body)):
            chunks.append(base | {"choices": [], "usage": self._whole_usage({"completion_tokens": 0})})
        return b"".join(map(encode_json, chunks)) + DONE_EVENT

    def _with_usage(self, event: bytes) -> bytes:
        prefix, separator, data = event.partition(b"data:")
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return event
        if type(chunk) is not dict or type(chunk.get("usage")) is not dict:
            return event
        chunk["usage"] = self._whole_usage(chunk["usage"])
        return prefix + separator + b" " + orjson.dumps(chunk)

    def _whole_usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        completion_tokens = self.said_tokens + int(usage.get("completion_tokens") or 0)
        # The engine's own figure where it gives one: /tokenize does not count what an image is made of.
        counted = usage.get("prompt_tokens")
        prompt_tokens = counted - self.said_tokens if type(counted) is int else self._prompt_tokens
        whole = usage | {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        details = usage.get("prompt_tokens_details")
        if type(details) is dict and type(details.get("cached_tokens")) is int:
            # The earlier attempt's prefix is cached where this one runs, or not: neither is the client's prompt.
            whole["prompt_tokens_details"] = details | {"cached_tokens": min(details["cached_tokens"], prompt_tokens)}
        return whole
