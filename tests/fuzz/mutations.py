"""Inputs from a seed: mutated bytes, mutated JSON values, and well-typed extreme values of a JSON schema."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Json = Any

EDGE_NUMBERS: tuple[int | float, ...] = (
    0, 1, -1, 2, 7, 63, 64, 127, 128, 255, 256, 65_535, 65_536, 99_999, 2**31 - 1, 2**31, 2**32, 2**40, 2**53,
    2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63),
    -(2**63) - 1, 0.5, -0.0, 1e-300, 1e300, 1e308,
)  # fmt: skip
EDGE_TEXTS: tuple[str, ...] = (
    "", " ", "0", "-1", "null", "true", "nan", "1e999", "\x00", "\n", "\r\n", "\r\n\r\n", "\u2028", "\ufeff", "\ud7ff",
    "\U0010ffff", "\u202e", "e\u0301", "%00", "%2e%2e", "../../etc/passwd", "{}", "[]", "'", '"', "\\", "\x1b[2J",
    "\x7f", "a" * 63, "a" * 64, "a" * 256, "a" * 257, "é" * 128, "x" * 5_000, "0-" + "0" * 32, "1-" + "f" * 32,
    "9999-" + "f" * 32, "sim", "default", "data: [DONE]\n\n", "🙂" * 70,
)  # fmt: skip
EDGE_BYTES: tuple[bytes, ...] = (
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b" ", b"\t", b":", b";",
    b",", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\ud800", b"0", b"-", b"9" * 40, b"f" * 20, b"[" * 2_000,
    b'{"a":' * 500, b"data: ", b"data: [DONE]\n\n", b": c\n", b"event: error\n", b"id: 1\n", b"--B--", b"--B\r\n",
    b"\xef\xbb\xbf", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
)  # fmt: skip
_MAX_INPUT_BYTES = 256 * 1024
_MAX_ROUNDS = 4


class Mutator:
    """Everything random of one run. The same seed and the same calls give the same inputs."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of ``choices``."""
        return choices[int(self.random.random() * len(choices))]

    def chance(self, share: float) -> bool:
        """True in ``share`` of the calls."""
        return self.random.random() < share

    def bytes_of(self, seed: bytes, words: Sequence[bytes] = EDGE_BYTES) -> bytes:
        """``seed`` changed in one to four places: bits, cuts, repeats, words of the format, pieces moved."""
        data = bytearray(seed)
        for _ in range(1 + int(self.random.random() * _MAX_ROUNDS)):
            self.pick(_BYTE_CHANGES)(self, data, words)
        return bytes(data[:_MAX_INPUT_BYTES])

    def json_of(self, seed: Json) -> Json:
        """``seed`` with one to three of its values replaced, removed, repeated or moved elsewhere."""
        value: Json = json.loads(json.dumps(seed))
        for _ in range(self.random.randint(1, 3)):
            places = list(_places(value))
            if not places:
                return self.any_json()
            holder, key = self.pick(places)
            roll = self.random.random()
            if roll < 0.55:
                holder[key] = self.any_json()
            elif roll < 0.7:
                del holder[key]
            elif roll < 0.85:
                other_holder, other_key = self.pick(places)
                if (isinstance(other_holder, dict) and other_key in other_holder) or (
                    isinstance(other_holder, list) and other_key < len(other_holder)
                ):
                    holder[key] = json.loads(json.dumps(other_holder[other_key]))
            elif isinstance(holder, dict):
                holder[self.text()] = self.any_json()
            else:
                holder.extend([holder[key]] * self.random.randint(1, 40))
        return value

    def any_json(self, depth: int = 0) -> Json:
        """A small JSON value of any kind, extreme as often as not."""
        roll = self.random.random()
        if depth < 3 and roll < 0.15:
            return [self.any_json(depth + 1) for _ in range(self.random.randint(0, 4))]
        if depth < 3 and roll < 0.3:
            return {self.text(): self.any_json(depth + 1) for _ in range(self.random.randint(0, 4))}
        if roll < 0.55:
            return self.pick(EDGE_NUMBERS)
        if roll < 0.85:
            return self.text()
        return self.pick((None, True, False, [], {}))

    def text(self) -> str:
        """A text, extreme as often as not."""
        if self.chance(0.7):
            return str(self.pick(EDGE_TEXTS))
        return "".join(chr(self.random.randint(1, 0xD7FF)) for _ in range(self.random.randint(1, 12)))

    def of_schema(self, schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int = 0) -> Json:
        """A value of the types and within the limits that ``schema`` (JSON Schema) gives; now and then just outside."""
        if "$ref" in schema:
            return self.of_schema(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions, depth)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self.of_schema(self.pick(schema[word]), definitions, depth)
        if "enum" in schema:
            return self.pick(schema["enum"])
        if "const" in schema:
            return schema["const"]
        if "default" in schema and self.chance(0.2):
            return schema["default"]
        return _MAKERS.get(schema.get("type", ""), Mutator._any_of_schema)(self, schema, definitions, depth)

    def _any_of_schema(self, _schema: Mapping[str, Any], _definitions: Mapping[str, Any], depth: int) -> Json:
        return self.any_json(depth)

    def _object(self, schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int) -> Json:
        required = schema.get("required", ())
        return {
            name: self.of_schema(part, definitions, depth + 1)
            for name, part in schema.get("properties", {}).items()
            if name in required or self.chance(0.7)
        }

    def _array(self, schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int) -> Json:
        most = min(schema.get("maxItems", 3), 300 if self.chance(0.02) else 3)
        return [
            self.of_schema(schema.get("items", {}), definitions, depth + 1) for _ in range(self.random.randint(0, most))
        ]

    def _number(self, schema: Mapping[str, Any], _definitions: Mapping[str, Any], _depth: int) -> Json:
        low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
        roll = self.random.random()
        if roll < 0.4:
            return self.pick((low, high))
        if roll < 0.5:
            return self.pick((low - 1, high + 1))
        return self.pick(EDGE_NUMBERS) if roll < 0.7 else self.random.randint(int(low), int(high))

    def _string(self, schema: Mapping[str, Any], _definitions: Mapping[str, Any], _depth: int) -> Json:
        longest = schema.get("maxLength", 300)
        return self.text() if self.chance(0.6) else self.pick("aé0\U0001f642") * (longest + self.random.randint(-1, 1))

    def _boolean(self, _schema: Mapping[str, Any], _definitions: Mapping[str, Any], _depth: int) -> Json:
        return self.chance(0.5)


_MAKERS: Mapping[str, Callable[[Mutator, Mapping[str, Any], Mapping[str, Any], int], Json]] = {
    "object": Mutator._object,
    "array": Mutator._array,
    "integer": Mutator._number,
    "number": Mutator._number,
    "string": Mutator._string,
    "boolean": Mutator._boolean,
}


def _flip(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    if data:
        data[mutator.random.randrange(len(data))] ^= 1 << mutator.random.randrange(8)


def _cut(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    if data:
        start = mutator.random.randrange(len(data))
        del data[start : start + mutator.random.randint(1, 16)]


def _truncate(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    if data:
        del data[mutator.random.randrange(len(data)) :]


def _repeat(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    if data:
        start = mutator.random.randrange(len(data))
        piece = data[start : start + mutator.random.randint(1, 64)]
        data[start:start] = piece * mutator.random.randint(1, 20)


def _insert(mutator: Mutator, data: bytearray, words: Sequence[bytes]) -> None:
    at = mutator.random.randint(0, len(data))
    data[at:at] = mutator.pick(words)


def _overwrite(mutator: Mutator, data: bytearray, words: Sequence[bytes]) -> None:
    at = mutator.random.randint(0, len(data))
    word = mutator.pick(words)
    data[at : at + len(word)] = word


def _move(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    if len(data) > 2:
        start = mutator.random.randrange(len(data))
        piece = data[start : start + mutator.random.randint(1, 64)]
        del data[start : start + len(piece)]
        at = mutator.random.randint(0, len(data))
        data[at:at] = piece


def _noise(mutator: Mutator, data: bytearray, _words: Sequence[bytes]) -> None:
    at = mutator.random.randint(0, len(data))
    data[at:at] = mutator.random.randbytes(mutator.random.randint(1, 12))


_BYTE_CHANGES = (_flip, _cut, _truncate, _repeat, _insert, _overwrite, _move, _noise)


def _places(value: Json) -> Sequence[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        pairs = (
            list(holder.items() if isinstance(holder, dict) else enumerate(holder))
            if isinstance(holder, (dict, list))
            else []
        )
        found += [(holder, key) for key, _ in pairs]
        waiting += [inner for _, inner in pairs]
    return found
