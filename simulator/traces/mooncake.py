"""Mooncake's traces: a JSON object a line, with prompts as ids of blocks.

Format: https://github.com/kvcache-ai/Mooncake (Qin et al., FAST 2025): ``timestamp`` in ms, ``input_length`` and
``output_length`` in tokens, ``hash_ids`` one id for each 512 tokens of the prompt, the last of them perhaps not full.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from ..requests import TraceRequest
from .reading import MalformedLine, Trace, in_order, text_lines

BLOCK_TOKENS = 512


def mooncake_trace(path: Path) -> Trace:
    """The trace in a ``.jsonl`` or ``.jsonl.gz``. Raises ``BadRequest`` with file and line where it is malformed."""
    found = in_order(path, _requests(path))
    return Trace(path.name, lambda: found, BLOCK_TOKENS)


def _requests(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    for number, line in text_lines(path):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise MalformedLine(path, number, f"not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise MalformedLine(path, number, "not a JSON object")
        prompt = _count(path, number, fields, "input_length")
        blocks = fields.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise MalformedLine(path, number, "hash_ids is not a list of integers")
        if len(blocks) > -(-prompt // BLOCK_TOKENS):
            raise MalformedLine(path, number, f"{len(blocks)} hash_ids for a prompt of {prompt} tokens: too many")
        yield (
            number,
            TraceRequest(
                _count(path, number, fields, "timestamp") / 1000,
                prompt,
                _count(path, number, fields, "output_length"),
                tuple(blocks[: prompt // BLOCK_TOKENS]),  # a block that is not full is never held by a cache
            ),
        )


def _count(path: Path, line: int, fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise MalformedLine(path, line, f"{name} is {value!r}, not a count")
    return value
