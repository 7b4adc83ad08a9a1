"""A tokenizer without a vocabulary: a token is up to four ASCII characters, or one character beyond ASCII.

Counting is one division for ASCII text, and ids turn back into exactly the text they came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CHARS_PER_TOKEN = 4
_PIECE = re.compile(r"[\x00-\x7f]{1,4}|[^\x00-\x7f]")
_BEYOND_ASCII = 1 << 30
VOCABULARY = _BEYOND_ASCII + 0x110000
"""Ids are below this."""
FOREIGN_VOCABULARY = 1 << 20
"""Ids of other tokenizers are below this."""
_PRIVATE_USE = 0xF0000


def count_tokens(text: str) -> int:
    """The number of tokens in ``text``."""
    if text.isascii():
        return (len(text) + CHARS_PER_TOKEN - 1) // CHARS_PER_TOKEN
    return len(_PIECE.findall(text))


def split_tokens(text: str) -> list[str]:
    """``text`` cut into its tokens."""
    if text.isascii():
        return [text[start : start + CHARS_PER_TOKEN] for start in range(0, len(text), CHARS_PER_TOKEN)]
    return _PIECE.findall(text)


def encode_tokens(text: str) -> list[int]:
    """The ids of the tokens in ``text``."""
    return [_id_of(piece) for piece in split_tokens(text)]


def decode_tokens(ids: Iterable[int]) -> str:
    """The text of ``ids``. Raises ``ValueError`` for a number that is no token."""
    return "".join(_piece_of(token) for token in ids)


def decode_foreign_tokens(ids: Iterable[int]) -> str:
    """The text of ``ids``, where an id that only another tokenizer has stands for one character of a private use area:
    clients that count tokens themselves send such ids. Raises ``ValueError`` for a number that no tokenizer has."""
    return "".join(_foreign_piece(token) for token in ids)


def _foreign_piece(token: int) -> str:
    try:
        return _piece_of(token)
    except ValueError:
        if not 0 <= token < FOREIGN_VOCABULARY:
            raise
        return chr(_PRIVATE_USE + token % 0xFFFE)


def _id_of(piece: str) -> int:
    first = ord(piece[0])
    if first > 127:
        return _BEYOND_ASCII + first
    value = len(piece) - 1
    for char in piece:
        value = value << 7 | ord(char)
    return value


def _piece_of(token: int) -> str:
    if _BEYOND_ASCII + 128 <= token < VOCABULARY:
        char = chr(token - _BEYOND_ASCII)
        if not "\ud800" <= char <= "\udfff":
            return char
    if 0 <= token < _BEYOND_ASCII:
        # The length stands above the characters, so at most one length fits.
        for length in range(1, CHARS_PER_TOKEN + 1):
            if token >> 7 * length == length - 1:
                return "".join(chr(token >> 7 * place & 0x7F) for place in reversed(range(length)))
    raise ValueError(f"{token} is not a token id")
