"""Log probabilities of a simulated answer: pure functions of each token and its index, as vLLM writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from .refusal import Fields, RefusedRequest

MAX_LOGPROBS = 20
_OTHERS = tuple(f" alt{number}" for number in range(MAX_LOGPROBS))


def chat_logprobs(fields: Fields) -> int | None:
    """How many alternatives a chat wants beside each token (``top_logprobs``); None: no log probabilities."""
    wanted, top = fields.get("logprobs"), fields.get("top_logprobs")
    if not isinstance(wanted, bool | None):
        raise RefusedRequest("logprobs: Input should be a valid boolean", param="logprobs")
    if top and not wanted:
        raise RefusedRequest("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    return _count(top, "top_logprobs") or 0 if wanted else None


def completion_logprobs(fields: Fields) -> int | None:
    """The same of a text completion, whose ``logprobs`` is a number."""
    return _count(fields.get("logprobs"), "logprobs")


def chat_content(pieces: Sequence[str], start: int, top: int) -> dict[str, Any]:
    """``logprobs`` of a chat's tokens, the first of which stands at place ``start`` of the answer."""
    return {
        "content": [
            {**_entry(piece, value), "top_logprobs": [_entry(*one) for one in _top(piece, value, top)]}
            for piece, value in zip(pieces, _values(pieces, start), strict=True)
        ]
    }


def completion_fields(
    pieces: Sequence[str], start: int, top: int, *, offset: int = 0, whole_prompt: bool = False
) -> dict[str, Any]:
    """``logprobs`` of a completion's tokens. The very first token of an echoed prompt (``whole_prompt``) has none."""
    values: list[float | None] = list(_values(pieces, start))
    if whole_prompt and start == 0 and values:
        values[0] = None
    return {
        "tokens": list(pieces),
        "token_logprobs": values,
        "top_logprobs": [
            None if value is None else dict(_top(piece, value, top))
            for piece, value in zip(pieces, values, strict=True)
        ],
        "text_offset": [offset + before for before in accumulate((len(piece) for piece in pieces[:-1]), initial=0)]
        if pieces
        else [],
    }


def _count(value: Any, param: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        raise RefusedRequest(f"{param}: Input should be a valid integer", param=param)
    if not 0 <= value <= MAX_LOGPROBS:
        raise RefusedRequest(f"{param} must be between 0 and {MAX_LOGPROBS}, got {value}.", param=param)
    return value


def _values(pieces: Sequence[str], start: int) -> list[float]:
    return [_value(piece, place % 64) for place, piece in enumerate(pieces, start)]


@lru_cache(maxsize=8192)
def _value(piece: str, place: int) -> float:
    drawn = hashlib.blake2b(f"{place}\0{piece}".encode("utf-8", "surrogatepass"), digest_size=2).digest()
    return -int.from_bytes(drawn, "big") / 2**16


def _top(piece: str, value: float, top: int) -> list[tuple[str, float]]:
    """The token itself, the likeliest, and ``top`` alternatives in all."""
    others = [(other, value - 1.0 - place) for place, other in enumerate(_OTHERS) if other != piece]
    return [(piece, value), *others][:top]


def _entry(piece: str, value: float) -> dict[str, Any]:
    return {"token": piece, "logprob": value, "bytes": list(piece.encode("utf-8", "surrogatepass"))}
