"""Make the answers of a simulated engine: pure functions of its seed and the request.

The same body gets the same text from every engine with the same seed and mode, however often it is asked: the text of
a second attempt equals the first's, and an answer that is to go on behind its own beginning goes on as it would have
without a break. ``temperature`` and the other sampling parameters are checked and then ignored; ``seed`` draws another
text. A smaller ``max_tokens`` gives a prefix of the same text.

A ``nondeterministic`` engine draws its words anew for each request. They show where they stand, so that a gap or a
repeat can be told: the word at place i is one of the four at ``WORDS[4 * (i % 64)]``, counted from the digest's first
token.
"""

from __future__ import annotations

import base64
import hashlib
import math
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from ..settings import SimulationSettings
from ..tokens import CHARS_PER_TOKEN, count_tokens, split_tokens
from .requests import DIGEST_CHARS, Generate, prompt_digest
from .structured import Shape, shaped_text

WORDS: tuple[str, ...] = tuple(f" {a}{b}{c}" for a, b, c in product("bcdfghjklmnprstv", "aeio", "bdnt"))
"""256 words with a leading space, each one token: a byte of the drawn stream picks one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: its tokens, ``finish`` "stop", "length" or "tool_calls", and the stop string that ended it, if one
    did. Its first ``thoughts`` tokens are reasoning. With ``call`` its tokens are the arguments of that function."""

    pieces: tuple[str, ...]
    finish: str
    stop: str | None = None
    thoughts: int = 0
    call: str = ""

    @property
    def text(self) -> str:
        """What it says, but for what it only thinks."""
        return "".join(self.pieces[self.thoughts :])

    @property
    def thought(self) -> str:
        """What it thinks."""
        return "".join(self.pieces[: self.thoughts])


def chat_prompt(messages: Iterable[tuple[str, str]]) -> str:
    """The prompt that a chat of (role, text) makes, for :func:`prompt_digest`."""
    return "".join(f"<|{role}|>{text}\n" for role, text in messages)


def answer(request: Generate, settings: SimulationSettings) -> tuple[Choice, ...]:
    """The choices of a request: ``n`` for each prompt, in the order of the prompts."""
    return tuple(_choice(asked, settings, index) for asked in request.prompts for index in range(asked.choices))


def embedding(text: str, model: str, seed: int, dimensions: int) -> list[float]:
    """A vector of length 1, drawn by seed, model and text. Fewer dimensions are a rescaled prefix of more."""
    key = f"{seed}\0{model}\0{text}".encode("utf-8", "surrogatepass")
    numbers = struct.unpack(f"<{dimensions}i", hashlib.shake_128(key).digest(4 * dimensions))
    norm = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return [number / norm for number in numbers]


def packed_embedding(vector: list[float]) -> str:
    """``vector`` as base64 of little-endian 32-bit floats."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _choice(request: Generate, settings: SimulationSettings, index: int) -> Choice:
    key = f"{settings.seed}\0{request.model}\0{request.seed}\0{index}\0{request.prompt}".encode(
        "utf-8", "surrogatepass"
    )
    if request.call:
        pieces, ended = _shaped(request, request.call.arguments, key)
        return Choice(tuple(pieces), "tool_calls" if ended else "length", call=request.call.name)
    if request.shape:
        pieces, ended = _shaped(request, request.shape, key)
    else:
        pieces, ended = _rest(request, *_drawn(request, settings, key))
    thoughts = 0 if request.shape else min(request.thoughts, len(pieces) // 2)
    if request.echo:
        pieces = split_tokens(request.prompt) + pieces
    finish = "stop" if ended else "length"
    if request.stop:
        text = "".join(pieces)
        found = [(at, stop) for stop in request.stop if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            kept = text[: at + len(stop)] if request.keep_stop else text[:at]
            return Choice(tuple(split_tokens(kept)), "stop", stop)
    return Choice(tuple(pieces), finish, thoughts=thoughts)


def _shaped(request: Generate, shape: Shape, key: bytes) -> tuple[list[str], bool]:
    """The tokens of a text of that shape behind the prefix, and whether it is complete within the limit."""
    text = shaped_text(shape, key)
    pieces = split_tokens(text.removeprefix(request.prefix))
    return pieces[: request.limit], len(pieces) <= request.limit


def _rest(request: Generate, pieces: list[str], ended: bool) -> tuple[list[str], bool]:
    """What is left of the answer behind the prefix. Behind one that is not its beginning, it is said from the start."""
    said = len(request.prefix)
    if not said or not "".join(pieces).startswith(request.prefix):
        return pieces[: request.limit], ended
    rest = "".join(pieces)[said:]
    return split_tokens(rest), ended


def _drawn(request: Generate, settings: SimulationSettings, key: bytes) -> tuple[list[str], bool]:
    """The tokens, as many as fit the limit behind those of the prefix, and whether the answer ended by itself."""
    limit = request.limit + count_tokens(request.prefix)
    if settings.mode == "echo":
        pieces = split_tokens(request.last_user)
    else:
        digest = prompt_digest(request.prompt)
        pieces = [digest[start : start + 4] for start in range(0, DIGEST_CHARS, 4)]
    if settings.mode == "echo" and not request.ignore_end:
        return pieces[:limit], len(pieces) <= limit
    length = limit
    if not request.ignore_end:
        # Between half and one and a half times the mean, drawn like the words.
        spread = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32
        length = max(len(pieces), round(settings.answer_tokens * (0.5 + spread)))
    words = min(length, limit) - len(pieces)
    if words > 0 and settings.nondeterministic:
        pieces += _placed_words(request.prefix, len(pieces), words)
    elif words > 0:
        pieces += [WORDS[byte] for byte in hashlib.shake_128(key).digest(words)]
    return pieces[:limit], not request.ignore_end and length <= limit


def _placed_words(prefix: str, first: int, words: int) -> list[str]:
    """The words at places ``first`` on: those that ``prefix`` holds already, then new ones."""
    said = [prefix[at : at + CHARS_PER_TOKEN] for at in range(first * CHARS_PER_TOKEN, len(prefix), CHARS_PER_TOKEN)]
    drawn = secrets.token_bytes(words)
    return [
        said[number] if number < len(said) else WORDS[(first + number) % 64 * 4 + drawn[number] % 4]
        for number in range(words)
    ]
