"""A file of who may call, read at the start and again whenever it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from queue_schemas import CannotStart
from telemetry import get_logger

_T = TypeVar("_T")

log = get_logger(__name__)


class WatchedFile(Generic[_T]):
    """What ``parse`` makes of the file's text and path. Raises ``CannotStart`` if that cannot be had at the start;
    later the last :attr:`value` stays. ``kind`` is what the file is of, in words; ``failure`` the log event when it
    cannot be read again."""

    def __init__(self, path: str, kind: str, parse: Callable[[str, str], _T], *, failure: str) -> None:
        self._path = Path(path)
        self._kind = kind
        self._failure = failure
        self._parse = parse
        self._stamp = (0, 0)
        self.value = self._read()

    def refresh(self) -> bool:
        """Read the file again if it changed; whether that gave another value. What is wrong with it is logged."""
        try:
            if _stamp(self._path) == self._stamp:
                return False
            self.value = self._read()
        except (CannotStart, OSError) as error:
            log.error(self._failure, error=str(error))
            return False
        return True

    def _read(self) -> _T:
        try:
            self._stamp = _stamp(self._path)
            text = self._path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CannotStart(f"the file of {self._kind} {self._path} cannot be read: {error}") from error
        return self._parse(text, str(self._path))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
