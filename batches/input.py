"""The input file of a batch, line by line from anywhere in it. All calls block."""

from __future__ import annotations

from collections.abc import Generator

from storage import FileRecord, Files, ObjectMissing

from .core import LineCutter, RawLine


class InputGone(Exception):
    """The input file was deleted, or a part of it."""


class InputLines:
    """The lines from a place on. Reads a piece ahead, and no more."""

    def __init__(self, files: Files, record: FileRecord, max_line_bytes: int, *, number: int, offset: int) -> None:
        self._pieces = files.read(record, offset)
        self._cutter = LineCutter(max_line_bytes, number=number, offset=offset)
        self._lines = self._cut()
        self.exhausted = False

    def next(self) -> RawLine | None:
        """The next line that is not blank; None at the end. Raises ``InputGone``, ``StoreUnavailable``."""
        try:
            line = next(self._lines, None)
        except ObjectMissing as error:
            raise InputGone from error
        self.exhausted = line is None
        return line

    def take(self, lines: int, size_bytes: int) -> list[RawLine]:
        """Up to so many lines and bytes, at least one if there is one."""
        taken: list[RawLine] = []
        size = 0
        while len(taken) < lines and size < size_bytes and (line := self.next()) is not None:
            taken.append(line)
            size += line.end - line.offset
        return taken

    def close(self) -> None:
        """Let go of the file."""
        self._lines.close()
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def _cut(self) -> Generator[RawLine, None, None]:
        for piece in self._pieces:
            yield from self._cutter.feed(piece)
        yield from self._cutter.end()


def read_range(files: Files, record: FileRecord, offset: int, end: int) -> bytes:
    """A part of the file. Raises ``InputGone``, ``StoreUnavailable``."""
    try:
        return b"".join(files.read(record, offset, end))
    except ObjectMissing as error:
        raise InputGone from error
