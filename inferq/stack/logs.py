"""A role's output: all of it to a bounded file, what went wrong to the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from telemetry.files import open_log

MAX_BYTES = 20 << 20
"""At this size the file becomes ``<name>.log.1``: at most twice as much is kept per role."""
_RAISED = re.compile(r"[\s|+-]*((?:[\w.]*(?:Error|Exception|Group|Interrupt|Exit)|Fenced)\b.*)")
_TOLD_LEVELS = ("error", "critical")


class RoleLog:
    """Use as a context manager; :meth:`write` takes the lines of one role. ``tell`` gets those for the terminal."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.last_words = ""
        """The last line that is no log record: what a process says when it cannot go on."""
        self._tell = tell
        self._file: BinaryIO | None = None
        self._bytes = 0

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, line: bytes) -> None:
        """One line, with or without its newline."""
        text = line.decode("utf-8", "replace").rstrip()
        self._keep(text)
        told = readable_error(text)
        if told is not None:
            self._tell(told)
            if not text.startswith("{"):
                self.last_words = told

    def _open(self) -> None:
        self._file = open_log(self.path)
        self._bytes = self._file.tell()

    def _keep(self, text: str) -> None:
        if self._file is None:
            return
        data = text.encode() + b"\n"
        if self._bytes + len(data) > MAX_BYTES:
            self._file.close()
            self.path.replace(self.path.with_suffix(".log.1"))
            self._open()
        self._file.write(data)
        self._bytes += len(data)


def readable_error(text: str) -> str | None:
    """What a person should see of one line of a role's output; None if it belongs in the file alone."""
    if not text:
        return None
    if not text.startswith("{"):
        # Of a traceback only what was raised; a sentence with which a role refuses to start as it is.
        raised = _RAISED.match(text)
        return raised[1] if raised else None if text[0].isspace() or text.startswith("Traceback") else text
    try:
        record = json.loads(text)
    except ValueError:
        return text
    if not isinstance(record, dict) or record.get("level") not in _TOLD_LEVELS:
        return None
    unsaid = ("level", "event", "timestamp", "ts", "role", "logger", "exception", "pid")
    facts = " ".join(f"{name}={value}" for name, value in record.items() if name not in unsaid)
    said = f"{record.get('event', '')} {facts}".strip()
    return f"{said}\n{record['exception']}" if record.get("exception") else said
