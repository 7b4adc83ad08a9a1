"""Chunks to files: each line once, by a bit for each."""

from __future__ import annotations

from collections.abc import Iterable

from .results import USAGE, Result


class Bits:
    """One bit for each line of the input, by its number from 0."""

    def __init__(self, data: bytes = b"", *, most: int = 0) -> None:
        self._bytes = bytearray(data) or bytearray(most // 8 + 1)

    def set(self, number: int) -> bool:
        """Set a bit; False if it was, or if there is none of that number."""
        at, bit = number >> 3, 1 << (number & 7)
        if at >= len(self._bytes) or self._bytes[at] & bit:
            return False
        self._bytes[at] |= bit
        return True

    def pack(self) -> bytes:
        return bytes(self._bytes)


class Fold:
    """What a step adds to the files: ``output`` and ``errors`` are lines of them, in pieces."""

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self.output: list[bytes] = []
        self.errors: list[bytes] = []
        self.output_bytes = self.error_bytes = 0
        self.completed = self.failed = 0
        self.usage = [0] * len(USAGE)

    def add(self, results: Iterable[Result]) -> None:
        """Take in what was not there yet."""
        for result in results:
            if not self.bits.set(result.line):
                continue
            if result.ok:
                self.output.append(result.text)
                self.output_bytes += len(result.text)
                self.completed += 1
                self.usage = [a + b for a, b in zip(self.usage, result.usage, strict=True)]
            else:
                self.errors.append(result.text)
                self.error_bytes += len(result.text)
                self.failed += 1
