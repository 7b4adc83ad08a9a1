"""The OpenAI wire format as vLLM writes it: bodies, chunks of a stream, error objects.

Chunks of one stream differ in their text only, so everything around it is built once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from .answers import WORDS, Choice
from .requests import Generate
from .settings import SimulationSettings

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
DONE = b"data: [DONE]\n\n"
GARBAGE = b'\x00\xff\xfe{"choices": [<<<\x80 not json, not an event\n\n'

_ESCAPED: dict[str, bytes] = {word: word.encode() for word in WORDS}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


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


def plain_body(request: Generate, choices: Sequence[Choice], usage: Usage, answer_id: str, created: int) -> bytes:
    """The whole answer as one object."""
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "chat.completion" if request.chat else "text_completion",
            "created": created,
            "model": request.model,
            "choices": [
                {
                    "index": index,
                    **(_message(choice.text) if request.chat else {"text": choice.text}),
                    "logprobs": None,
                    "finish_reason": choice.finish,
                    "stop_reason": choice.stop,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage.fields(),
        }
    )


class StreamWire:
    """One streamed answer in the making: :meth:`opening`, then :meth:`tokens` in order, then :meth:`closing`."""

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
        self.steps = max(len(choice.pieces) for choice in choices)

    def opening(self) -> bytes:
        """What comes with the first token: the role, for a chat."""
        if not self._request.chat:
            return b""
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return b"".join(self._head + b'{"index":%d,%b' % (index, role) for index in range(len(self._choices)))

    def tokens(self, start: int, end: int) -> bytes:
        """The chunks of engine steps ``start`` to ``end``: in each, every choice that goes on gets one token."""
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
        return b"".join((*parts, DONE))


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


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}}


def _escaped(piece: str) -> bytes:
    known = _ESCAPED.get(piece)
    return orjson.dumps(piece)[1:-1] if known is None else known
