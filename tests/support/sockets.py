"""Who holds which TCP connection of this machine, read from the kernel's tables."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Held:
    """The clients' ports of the connections that one process had accepted at one instant of ``time.monotonic()``."""

    at_s: float
    ports: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Row:
    local_port: int
    peer_port: int
    listens: bool
    inode: str


def kill_holding(pid: int, port: int) -> Held:
    """SIGKILL ``pid``, and what it held of the server port ``port`` in that moment."""
    os.kill(pid, signal.SIGSTOP)  # from now on it accepts nothing more
    held = held_by(pid, port)
    os.kill(pid, signal.SIGKILL)
    return held


def held_by(pid: int, port: int) -> Held:
    """The connections to ``port`` that ``pid`` has accepted."""
    own = _inodes(pid)
    rows = [row for row in _rows() if row.local_port == port and not row.listens and row.inode in own]
    return Held(time.monotonic(), frozenset(row.peer_port for row in rows))


def listeners(pid: int) -> set[int]:
    """The ports on which ``pid`` listens."""
    own = _inodes(pid)
    return {row.local_port for row in _rows() if row.listens and row.inode in own}


def _rows() -> list[_Row]:
    rows = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, peer = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            rows.append(_Row(local, peer, fields[3] == _LISTEN, fields[9]))
    return rows


def _inodes(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            target = str(entry.readlink())
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found
