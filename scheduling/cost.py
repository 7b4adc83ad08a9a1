"""What a request costs, in units of one prompt token: estimated before it runs, and measured afterwards.

Weights as in the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): a prompt
token counts 1, an output token 2, a prompt token from the engine's prefix cache a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from queue_schemas.job import MAX_COST
from queue_schemas.records import record

OUTPUT_WEIGHT = 2
CACHED_PART = 10
"""A cached prompt token costs one part in so many of one that is computed."""
BYTES_PER_TOKEN = 4
MEDIA_TOKENS = 1_000
"""What an image, a recording or a file counts for: its bytes say nothing of its tokens."""
USUAL_OUTPUT = 256
"""Output tokens of a request that names no limit."""
MAX_OUTPUT = 4_096
"""A higher limit is a limit, and no wish: hardly an answer comes near it."""
MAX_TOKENS = 10_000_000
"""What an engine reports beyond this is no count of tokens."""
_GENERATES = ("completions", "messages", "responses", "generate")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MAX_ANSWERS = 128
_MEDIA_PARTS = (
    "image_url", "video_url", "audio_url", "input_audio", "input_image", "input_file", "image", "file", "document",
)  # fmt: skip
_MAX_VALUES = 20_000
"""Of a request with media that are looked at: some 5 ms of a Router's time."""
_BLOB_BYTES = 1_024
"""Text of this length without a space is no text."""


@record
class Usage:
    """Tokens of one answer. ``cached`` are those of ``prompt`` that came from the engine's prefix cache."""

    prompt: int
    output: int
    cached: int = 0


def cost_of(usage: Usage) -> int:
    """What an answer has cost; at least 1."""
    cached = min(usage.cached, usage.prompt)
    return _bounded(usage.prompt - cached + cached // CACHED_PART + OUTPUT_WEIGHT * usage.output)


def prompt_tokens(body: bytes) -> int:
    """A guess at the prompt's tokens by the bytes of a request without media."""
    return len(body) // BYTES_PER_TOKEN


def estimate_cost(path: str, body: bytes, request: Mapping[str, Any]) -> int:
    """What a request for ``path`` will cost. ``request`` is the parsed ``body``, of which nothing is believed; only one
    with media is looked through."""
    # Each way to bring media names it so: parts of chats and messages, inputs of responses and embeddings.
    if body.find(b"base64") >= 0 or body.find(b'_url"') >= 0 or body.find(b'_audio"') >= 0 or body.find(b'_file"') >= 0:
        prompt = _tokens_with_media(request, len(body))
    else:
        prompt = len(body) // BYTES_PER_TOKEN
    if not path.endswith(_GENERATES):
        return _bounded(prompt)
    output = USUAL_OUTPUT
    for name in _LIMITS:
        limit = request.get(name)
        if type(limit) is int:
            output = min(max(limit, 1), MAX_OUTPUT)
            break
    answers, prompts = request.get("n"), request.get("prompt")
    if type(prompts) is list and prompts and type(prompts[0]) is not int:
        output *= min(len(prompts), _MAX_ANSWERS)
    if type(answers) is int and answers > 1:
        output *= min(answers, _MAX_ANSWERS)
    return _bounded(prompt + OUTPUT_WEIGHT * output)


def estimate_form_cost() -> int:
    """What a form with a recording will cost."""
    return MEDIA_TOKENS + OUTPUT_WEIGHT * USUAL_OUTPUT


def _tokens_with_media(request: object, body_bytes: int) -> int:
    """The same guess by a parsed request's text, media counted flat. One of more than ``_MAX_VALUES`` is guessed by its
    bytes."""
    size, media, pending = 0, 0, [request]
    for _ in range(_MAX_VALUES):
        if not pending:
            break
        value = pending.pop()
        if type(value) is dict and value.get("type") in _MEDIA_PARTS:
            media += 1
        elif type(value) is dict:
            size += 4 * len(value)
            pending += value.values()
        elif type(value) is list:
            pending += value
        elif type(value) is str:
            is_media = len(value) >= _BLOB_BYTES and " " not in value[:_BLOB_BYTES]
            media, size = media + is_media, size + (0 if is_media else len(value))
        else:
            size += 4
    if pending:
        size = body_bytes
    return size // BYTES_PER_TOKEN + MEDIA_TOKENS * media


def _bounded(cost: int) -> int:
    return max(1, min(cost, MAX_COST))
