"""Merge chunks of results into the lines of the output and error files, each line of the input once."""

from __future__ import annotations

from collections.abc import Iterable

from .results import USAGE, Result


class LineBitmap:
    """The lines that are in the files already: one bit for each line of the input, by its number."""

    def __init__(self, data: bytes = b"", *, line_count: int = 0) -> None:
        self._bytes = bytearray(data) or bytearray(line_count // 8 + 1)

    def add(self, number: int) -> bool:
        """Add a line; False if it was added before, or the input has no such line."""
        at, bit = number >> 3, 1 << (number & 7)
        if at >= len(self._bytes) or self._bytes[at] & bit:
            return False
        self._bytes[at] |= bit
        return True

    def pack(self) -> bytes:
        return bytes(self._bytes)


class MergedLines:
    """The lines that one merge step adds to the files: pieces of ``output`` and ``errors``, their sizes and counts."""

    def __init__(self, merged: LineBitmap) -> None:
        self.merged = merged
        self.output: list[bytes] = []
        self.errors: list[bytes] = []
        self.output_bytes = self.error_bytes = 0
        self.completed = self.failed = 0
        self.usage = [0] * len(USAGE)

    def add(self, results: Iterable[Result]) -> None:
        """Add the results of lines that are not in the files yet."""
        for result in results:
            if not self.merged.add(result.line):
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
