"""The simulated engine's answers on paths of scoring, reranking, classifying and audio models: of the right shape, and
the same for the same request."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson

from ..settings import SimulationSettings
from ..tokens import count_tokens
from . import wire
from .answers import embedding
from .refusal import Fields, RefusedRequest
from .requests import model_of, parse_object
from .wire import Reply

_LABELS = ("LABEL_0", "LABEL_1")
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')


def rerank(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /rerank``: the documents by how well they answer the query."""
    fields = parse_object(body)
    model, query = model_of(fields, settings), _text(fields, "query")
    documents = _texts(fields, "documents")
    scored = [
        {"index": place, "document": {"text": text}, "relevance_score": _score(model, query, text)}
        for place, text in enumerate(documents)
    ]
    scored.sort(key=lambda one: -float(str(one["relevance_score"])))
    top = fields.get("top_n")
    results = scored[:top] if type(top) is int and top > 0 else scored
    tokens = sum(map(count_tokens, (query, *documents)))
    return _reply({"id": "rerank-sim", "model": model, "usage": {"total_tokens": tokens}, "results": results})


def score(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /score``: one text with each of several, or pair by pair."""
    fields = parse_object(body)
    model = model_of(fields, settings)
    names = ("text_1", "text_2") if "text_1" in fields else ("queries", "documents")
    left, right = _texts(fields, names[0]), _texts(fields, names[1])
    if len(left) == 1:
        left *= len(right)
    if len(left) != len(right):
        raise RefusedRequest("Input lengths must be either 1:1, 1:N or N:N", param=names[1])
    data = [
        {"index": place, "object": "score", "score": _score(model, one, other)}
        for place, (one, other) in enumerate(zip(left, right, strict=True))
    ]
    return _listed("score-sim", model, data, [*left, *right])


def classify(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /classify``: a label for each input."""
    fields = parse_object(body)
    model, texts = model_of(fields, settings), _texts(fields, "input")
    data = []
    for place, text in enumerate(texts):
        second = _score(model, "", text)
        label = _LABELS[second > 0.5]
        probabilities = [round(1 - second, 6), second]
        data.append({"index": place, "label": label, "probs": probabilities, "num_classes": len(_LABELS)})
    return _listed("classify-sim", model, data, texts)


def pooling(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /pooling``: a vector for each input."""
    fields = parse_object(body)
    model, texts = model_of(fields, settings), _texts(fields, "input")
    data = [
        {
            "index": place,
            "object": "pooling",
            "data": embedding(text, model, settings.seed, settings.embedding_dimensions),
        }
        for place, text in enumerate(texts)
    ]
    return _listed("pool-sim", model, data, texts)


def count_message_tokens(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /v1/messages/count_tokens``: how many tokens a conversation has."""
    fields = parse_object(body)
    model_of(fields, settings)
    if not isinstance(fields.get("messages"), list):
        raise RefusedRequest("messages: Input should be a valid list", param="messages")
    said = (fields.get("system"), fields["messages"], fields.get("tools"))
    return _reply({"input_tokens": sum(count_tokens(text) for part in said for text in _said(part))})


def hear(body: bytes, settings: SimulationSettings) -> Reply:
    """``POST /v1/audio/transcriptions`` and ``translations``: a text about a form with a recording."""
    found = _FORM_MODEL.search(body)
    model_of({"model": found[1].decode("utf-8", "replace")} if found else {}, settings)
    return _reply({"text": f"A simulated transcription of a form of {len(body)} bytes."})


def _score(model: str, one: str, other: str) -> float:
    """Words in common count; the rest is the texts' digest."""
    mine, theirs = set(one.lower().split()), set(other.lower().split())
    common = len(mine & theirs) / max(1, len(mine))
    digest = hashlib.blake2b(f"{model}\0{one}\0{other}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return round(0.7 * common + 0.3 * int.from_bytes(digest, "big") / 2**32, 6)


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise RefusedRequest(f"{name}: Input should be a valid string", param=name)
    return value


def _texts(fields: Fields, name: str) -> list[str]:
    """A text, or a list of texts and of documents with a text."""
    value = fields.get(name)
    found = []
    for item in value if isinstance(value, list) else [value]:
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise RefusedRequest(f"{name}: Input should be a text or a list of texts", param=name)
        found.append(text)
    if not found:
        raise RefusedRequest(f"{name}: Input should have at least one entry", param=name)
    return found


def _said(part: Any) -> list[str]:
    """All texts in a part of a conversation, however deep."""
    found, stack = [], [part]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, list | dict):
            stack += node.values() if isinstance(node, dict) else node
    return found


def _listed(answer_id: str, model: str, data: list[dict[str, Any]], texts: list[str]) -> Reply:
    tokens = sum(map(count_tokens, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return _reply({"id": answer_id, "object": "list", "created": 0, "model": model, "data": data, "usage": usage})


def _reply(fields: dict[str, Any]) -> Reply:
    return Reply(200, wire.JSON, orjson.dumps(fields))
