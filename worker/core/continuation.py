"""Continue a stream where an earlier attempt stopped: the request to the engine, and the usage of the whole answer.

Rules:

* The engine is asked for what follows the prefix: behind the assistant's last message of a chat
  (``continue_final_message``), or behind the prompt of a completion.
* That is right only if the engine really reads the prefix there. Chat templates may strip it, put something behind it,
  or something else in front of it than they put in front of an answer (a beginning of thoughts, say). So the engine's
  own tokenizer is asked: the tokens of the longer prompt, turned back into text, must be the original prompt's text
  and then the prefix, to the letter.
* The client gets the usage of one answer. The tokens said so far are those by which the longer prompt exceeds
  the original one; limits are lowered by them, and ``usage`` is put right.

Which requests may be continued at all is decided by the Router (:mod:`openai_api.completions.continuable`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from openai_api.paths import CHAT_PATH, wants_usage
from openai_api.sse import DONE_EVENT, encode_json, end_of_events
from queue_schemas import Job

COMPLETION_TOKENS = 16
"""What a completion without ``max_tokens`` may say, by the OpenAI API; a chat may fill the context."""
_MARGIN_TOKENS = 8
"""Tokens that both prompts have which are turned back into text with those that they have not: the cut may lie within a
character."""


@dataclass(frozen=True, slots=True)
class PromptRequests:
    """The requests that ask an engine about the original prompt and about the one with the prefix."""

    original: bytes
    continued: bytes


def tokenized(job: Job) -> PromptRequests:
    """How the tokens of ``job`` are asked for, which has a prefix."""
    request = orjson.loads(job.body)
    base = {"model": request["model"]}
    if job.path != CHAT_PATH:
        prompt = request["prompt"]
        return PromptRequests(
            orjson.dumps(base | {"prompt": prompt}), orjson.dumps(base | {"prompt": prompt + job.prefix})
        )
    return PromptRequests(
        orjson.dumps(base | {"messages": request["messages"]}),
        orjson.dumps(base | _continued_chat(request, job.prefix)),
    )


def detokenized(job: Job, original: list[int], continued: list[int]) -> PromptRequests:
    """How an engine's ``/detokenize`` is asked for the texts from where the two prompts differ: they must be equal but
    for the prefix."""
    same = next(
        (place for place, (one, other) in enumerate(zip(original, continued, strict=False)) if one != other),
        min(len(original), len(continued)),
    )
    start = max(same - _MARGIN_TOKENS, 0)
    return PromptRequests(
        *(orjson.dumps({"model": job.model, "tokens": tokens[start:]}) for tokens in (original, continued))
    )


def continue_request(job: Job, prompt_tokens: int, said_tokens: int) -> Continuation:
    """The request for the rest of the answer. ``prompt_tokens`` are the original prompt's, ``said_tokens`` those of the
    prefix."""
    request = orjson.loads(job.body)
    if job.path == CHAT_PATH:
        request |= _continued_chat(request, job.prefix)
    else:
        request["prompt"] += job.prefix
        if request.get("max_tokens") is None:
            request["max_tokens"] = COMPLETION_TOKENS
    exhausted = False
    for name in ("max_tokens", "max_completion_tokens"):
        if type(request.get(name)) is int:
            request[name] -= said_tokens
            exhausted = exhausted or request[name] <= 0
    if type(request.get("min_tokens")) is int:
        request["min_tokens"] = max(request["min_tokens"] - said_tokens, 0)
    return Continuation(job, None if exhausted else orjson.dumps(request), prompt_tokens, said_tokens)


def _continued_chat(request: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "messages": [*request["messages"], {"role": "assistant", "content": prefix}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


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
