"""Write an engine's output to a file, and keep its last lines for error messages."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import BinaryIO

from telemetry import get_logger
from telemetry.files import open_log

MAX_FILE_BYTES = 10 * 1024 * 1024
"""A file that is larger becomes ``<name>.1``, replacing the one before."""
KEPT_LINES = 200
MAX_LINE_BYTES = 2_000

log = get_logger(__name__)


class LogTail:
    """Keeps the last lines and appends everything to ``path``, if given. A disk that is full costs only the file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._unfinished = b""
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """Take ``data`` as the process wrote it."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[-MAX_LINE_BYTES:]
        self._lines.extend(line[:MAX_LINE_BYTES] for line in lines)
        if self.path is not None:
            try:
                self._append(self.path, data)
            except OSError as error:
                log.warning("engine_log_not_written", path=str(self.path), error=str(error))
                self.close()
                self.path = None

    def last(self, count: int) -> list[str]:
        """The last ``count`` lines, an unfinished one included."""
        lines = [*self._lines, self._unfinished] if self._unfinished else list(self._lines)
        return [line.decode("utf-8", "replace").rstrip() for line in lines[-count:]]

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, path: Path, data: bytes) -> None:
        if self._file is None:
            self._file = open_log(path)
            self._size = self._file.tell()
        self._file.write(data)
        self._size += len(data)
        if self._size > MAX_FILE_BYTES:
            self.close()
            path.replace(path.with_name(path.name + ".1"))
