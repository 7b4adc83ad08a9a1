"""Read the input file of a batch, line by line from any place in it. All calls block."""

from __future__ import annotations

from collections.abc import Generator

from queue_schemas import Tenant
from storage import Batch, BatchError, FileRecord, FileStore, ObjectMissing

from ..core import LineSplitter, RawLine


class InputDeleted(Exception):
    """The input file, or a part of it, was deleted."""


class InputLines:
    """The lines from a place on. It reads one piece ahead at most."""

    def __init__(self, files: FileStore, record: FileRecord, max_line_bytes: int, *, number: int, offset: int) -> None:
        self._pieces = files.read(record, offset)
        self._splitter = LineSplitter(max_line_bytes, number=number, offset=offset)
        self._lines = self._split()
        self.exhausted = False

    def next(self) -> RawLine | None:
        """The next line that is not blank; None at the end. Raises ``InputDeleted``, ``StoreUnavailable``."""
        try:
            line = next(self._lines, None)
        except ObjectMissing as error:
            raise InputDeleted from error
        self.exhausted = line is None
        return line

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def _split(self) -> Generator[RawLine, None, None]:
        for piece in self._pieces:
            yield from self._splitter.feed(piece)
        yield from self._splitter.end()


def read_range(files: FileStore, record: FileRecord, offset: int, end: int) -> bytes:
    """Bytes ``offset`` to ``end`` (exclusive) of the file. Raises ``InputDeleted``, ``StoreUnavailable``."""
    try:
        return b"".join(files.read(record, offset, end))
    except ObjectMissing as error:
        raise InputDeleted from error


def input_of(files: FileStore, batch: Batch) -> FileRecord | None:
    """The input file; None if it was deleted. One that expires while its batch runs stays until the batch has ended."""
    return files.get(Tenant(batch.request.tenant), batch.request.input_file_id, now_s=0)


def input_deleted(batch: Batch) -> BatchError:
    """The error of a batch whose input file was deleted."""
    message = f"the input file {batch.request.input_file_id} was deleted before the batch ended"
    return BatchError(code="input_file_deleted", message=message, param="input_file_id")
