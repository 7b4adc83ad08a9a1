"""The OpenAI wire format as vLLM writes it: bodies, chunks of a stream, error objects.

Chunks of one stream differ in their text only, so everything around it is built once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from openai_api.sse import DONE_EVENT, EVENT_STREAM

from ..settings import SimulationSettings
from .answers import WORDS, Choice
from .logprobs import chat_content, completion_fields
from .requests import Generate

JSON = "application/json"
EVENTS = f"{EVENT_STREAM}; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
GARBAGE = b'\x00\xff\xfe{"choices": [<<<\x80 not json, not an event\n\n'

_ESCAPED: dict[str, bytes] = {word: word.encode() for word in WORDS}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0

    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens:
            fields["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return fields


def error_object(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    """vLLM's error object: ``code`` is the status."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def model_list(settings: SimulationSettings, created: int) -> bytes:
    """``GET /v1/models``: base models, then adapters with their parent."""
    base = settings.models[0]
    cards = [(model, None) for model in settings.models] + [(adapter, base) for adapter in settings.adapters]
    return orjson.dumps(
        {
            "object": "list",
            "data": [
                {
                    "id": model,
                    "object": "model",
                    "created": created,
                    "owned_by": "simulation",
                    "root": model,
                    "parent": parent,
                    "max_model_len": settings.max_model_len,
                    "permission": [],
                }
                for model, parent in cards
            ],
        }
    )


def embedding_list(
    vectors: Sequence[list[float] | str], answer_id: str, created: int, model: str, tokens: int
) -> bytes:
    """``POST /v1/embeddings``: each vector as numbers or as base64."""
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "list",
            "created": created,
            "model": model,
            "data": [
                {"index": index, "object": "embedding", "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    status: int
    content_type: str
    body: bytes


class AnswerWire(Protocol):
    """One answer in the making: :meth:`whole`, or streamed: :meth:`opening`, then :meth:`tokens` in order, then
    :meth:`closing`. ``steps`` is how many engine steps it takes."""

    steps: int

    def __init__(self, request: Generate, choices: Sequence[Choice], answer_id: str, created: int) -> None: ...

    def whole(self, usage: Usage) -> bytes:
        """The whole answer as one object."""
        ...

    def opening(self) -> bytes:
        """What comes with the first token."""
        ...

    def tokens(self, start: int, end: int) -> bytes:
        """What engine steps ``start`` to ``end`` give."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """The end of the stream."""
        ...


class StreamWire:
    """A chat or text completion."""

    def __init__(self, request: Generate, choices: Sequence[Choice], answer_id: str, created: int) -> None:
        self._request = request
        self._choices = choices
        kind = "chat.completion.chunk" if request.chat else "text_completion"
        self._head = b'data: {"id":"%b","object":"%b","created":%d,"model":%b,"choices":[' % (
            answer_id.encode(),
            kind.encode(),
            created,
            orjson.dumps(request.model),
        )
        before, after = (b'"delta":{"content":"', b'"}') if request.chat else (b'"text":"', b'"')
        self._tail = after + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._heads = [self._head + b'{"index":%d,%b' % (index, before) for index in range(len(choices))]
        self._answer_id, self._created = answer_id, created
        self._plain = request.logprobs is None and not any(choice.call or choice.thoughts for choice in choices)
        self.steps = max(len(choice.pieces) for choice in choices)

    def whole(self, usage: Usage) -> bytes:
        """The whole answer as one object."""
        chat = self._request.chat
        return orjson.dumps(
            {
                "id": self._answer_id,
                "object": "chat.completion" if chat else "text_completion",
                "created": self._created,
                "model": self._request.model,
                "choices": [
                    {
                        "index": index,
                        **({"message": _message(choice, self._answer_id)} if chat else {"text": choice.text}),
                        "logprobs": self._logprobs(choice, choice.thoughts, len(choice.pieces)),
                        "finish_reason": choice.finish,
                        "stop_reason": choice.stop,
                    }
                    for index, choice in enumerate(self._choices)
                ],
                "usage": usage.fields(),
            }
        )

    def opening(self) -> bytes:
        """What comes with the first token: the role, for a chat."""
        if not self._request.chat:
            return b""
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return b"".join(self._head + b'{"index":%d,%b' % (index, role) for index in range(len(self._choices)))

    def tokens(self, start: int, end: int) -> bytes:
        """The chunks of engine steps ``start`` to ``end``: in each, every choice that goes on gets one token."""
        if not self._plain:
            return b"".join(
                self._special(index, choice, step)
                for step in range(start, end)
                for index, choice in enumerate(self._choices)
                if step < len(choice.pieces)
            )
        if len(self._choices) == 1:
            pieces = [_escaped(piece) for piece in self._choices[0].pieces[start:end]]
            if not pieces:
                return b""
            head = self._heads[0]
            return head + (self._tail + head).join(pieces) + self._tail
        return b"".join(
            head + _escaped(choice.pieces[step]) + self._tail
            for step in range(start, end)
            for head, choice in zip(self._heads, self._choices, strict=True)
            if step < len(choice.pieces)
        )

    def _logprobs(self, choice: Choice, start: int, end: int) -> dict[str, Any] | None:
        """The log probabilities of tokens ``start`` to ``end``, if they were asked for; thoughts have none."""
        top = self._request.logprobs
        if top is None or start < choice.thoughts:
            return None
        pieces = choice.pieces[start:end]
        if self._request.chat:
            return chat_content(pieces, start, top)
        offset = sum(len(piece) for piece in choice.pieces[:start])
        return completion_fields(pieces, start, top, offset=offset, whole_prompt=self._request.echo)

    def _special(self, index: int, choice: Choice, step: int) -> bytes:
        """A chunk with more than plain text: of a thought, of a call of a function, or with log probabilities."""
        piece, logprobs = choice.pieces[step], self._logprobs(choice, step, step + 1)
        if not self._request.chat:
            chunk = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": None}
            return self._head + orjson.dumps(chunk) + b"]}\n\n"
        delta: dict[str, Any] = {"content": piece}
        if choice.call:
            begun: dict[str, Any] = {} if step else _called(choice, self._answer_id)
            function = ({} if step else {"name": choice.call}) | {"arguments": piece}
            delta = {"tool_calls": [{"index": 0, **begun, "function": function}]}
        elif step < choice.thoughts:
            delta = {"reasoning": piece}
        said = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._head + orjson.dumps(said) + b"]}\n\n"

    def closing(self, usage: Usage) -> bytes:
        """Why each choice ended, the usage chunk if it was asked for, and the end of the stream."""
        empty = {"delta": {"content": ""}} if self._request.chat else {"text": ""}
        parts = []
        for index, choice in enumerate(self._choices):
            end = {
                "index": index,
                **empty,
                "logprobs": None,
                "finish_reason": choice.finish,
                "stop_reason": choice.stop,
            }
            parts.append(self._head + orjson.dumps(end) + b"]}\n\n")
        if self._request.include_usage:
            parts.append(self._head + b'],"usage":' + orjson.dumps(usage.fields()) + b"}\n\n")
        return b"".join((*parts, DONE_EVENT))


def metrics_text(samples: Mapping[str, float], model: str) -> bytes:
    """Prometheus text. Names that end in ``_total`` are counters; a name may carry labels of its own."""
    lines: list[str] = []
    quoted = orjson.dumps(model).decode()
    for name, value in samples.items():
        family, _, labels = name.partition("{")
        kind = "counter" if family.endswith("_total") else "gauge"
        extra = "," + labels.rstrip("}") if labels else ""
        if f"# TYPE {family} {kind}" not in lines:
            lines.append(f"# TYPE {family} {kind}")
        lines.append(f'{family}{{engine="0",model_name={quoted}{extra}}} {float(value)}')
    return "\n".join((*lines, "")).encode()


def _message(choice: Choice, answer_id: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": []}
    if choice.call:
        function = {"name": choice.call, "arguments": choice.text}
        return message | {"content": None, "tool_calls": [_called(choice, answer_id) | {"function": function}]}
    return message | {"reasoning": choice.thought} if choice.thoughts else message


def _called(choice: Choice, answer_id: str) -> dict[str, Any]:
    return {"id": f"call-{choice.call}-{answer_id}", "type": "function"}


def _escaped(piece: str) -> bytes:
    known = _ESCAPED.get(piece)
    return orjson.dumps(piece)[1:-1] if known is None else known
