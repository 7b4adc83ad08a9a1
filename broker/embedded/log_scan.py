"""Find the end of the intact part of a command file in the embedded server's append-only log.

Used by :mod:`broker.embedded.queue_log`. A file holds commands in RESP, transactions from MULTI to EXEC, and
annotations that begin with ``#``.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMMAND = re.compile(rb"\*([0-9]{1,9})\r\n")
_ARGUMENT = re.compile(rb"\$([0-9]{1,10})\r\n")
_ANNOTATION = re.compile(rb"#[^\r\n]{0,1000}\r?\n")
_RESUMES = re.compile(rb"\*[1-9][0-9]{0,6}\r\n\$[0-9]{1,10}\r\n")
_MAX_TRIES = 1_000


@dataclass(frozen=True, slots=True)
class Damage:
    """``path`` is readable up to byte ``at`` of ``size``. ``commands_follow``: after that, whole commands or further
    files can be read again."""

    path: Path
    at: int
    size: int
    commands_follow: bool = False

    @property
    def bytes_cut(self) -> int:
        """How much is lost by cutting it."""
        return self.size - self.at


def scan(file: Path, *, last: bool) -> Damage | None:
    """The first place of ``file`` that cannot be read; None if there is none. ``last``: no file follows it, so it may
    break off at its end, which Valkey repairs itself."""
    size = file.stat().st_size
    if not size:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        good = 0
        for end, is_last in _transactions(data):
            if is_last:
                return None
            good = end
        broken = _broken_at(data, good)
        if broken is None:
            return None if last else Damage(file, good, size, commands_follow=True)
        return Damage(file, good, size, commands_follow=not last or _resumes(data, broken))


def _transactions(data: mmap.mmap) -> Iterator[tuple[int, bool]]:
    """The ends of all that is whole: single commands, and from MULTI to EXEC; True with the last if it is the end."""
    at, open_since, size = 0, None, len(data)
    while at < size:
        after, name = _command(data, at)
        if after is None:
            return
        if name == b"MULTI":
            open_since = at
        elif name == b"EXEC":
            open_since = None
        at = after
        if open_since is None:
            yield at, at == size


def _command(data: mmap.mmap, at: int) -> tuple[int | None, bytes]:
    """Where the command (or annotation) at ``at`` ends, and its upper-case name; None if it is none, or not whole."""
    if data[at : at + 1] == b"#":
        note = _ANNOTATION.match(data, at)
        return (note.end() if note else None), b""
    head = _COMMAND.match(data, at)
    if head is None:
        return None, b""
    at, name = head.end(), b""
    for number in range(int(head[1])):
        argument = _ARGUMENT.match(data, at)
        if argument is None:
            return None, b""
        begin = argument.end()
        at = begin + int(argument[1]) + 2
        if data[at - 2 : at] != b"\r\n":
            return None, b""
        if number == 0:
            name = data[begin : min(at - 2, begin + 20)].upper()
    return at, name


def _broken_at(data: mmap.mmap, at: int) -> int | None:
    """Where behind ``at`` something stands that is no command; None if the file only ends too early."""
    size = len(data)
    while at < size:
        after, _ = _command(data, at)
        if after is None:
            return None if _is_beginning(data, at) else at
        at = after
    return None


def _is_beginning(data: mmap.mmap, at: int) -> bool:
    """Whether what stands at ``at`` is the beginning of a command that the end of the file cut short."""
    size = len(data)
    head = _COMMAND.match(data, at)
    if head is None:
        return size - at < 12 and re.fullmatch(rb"\*[0-9]{0,9}\r?|#[^\r\n]*", data[at:]) is not None
    at = head.end()
    for _ in range(int(head[1])):
        argument = _ARGUMENT.match(data, at)
        if argument is None:
            return size - at < 14 and re.fullmatch(rb"(\$[0-9]{0,10}\r?)?", data[at:]) is not None
        at = argument.end() + int(argument[1]) + 2
        if at > size:
            return data[at - 2 : size] in (b"", b"\r")
        if data[at - 2 : at] != b"\r\n":
            return False
    return False


def _resumes(data: mmap.mmap, at: int) -> bool:
    """Whether a whole command can be read somewhere behind the damage."""
    for number, found in enumerate(_RESUMES.finditer(data, at + 1)):
        if number >= _MAX_TRIES:
            return True
        if _command(data, found.start())[0] is not None:
            return True
    return False
