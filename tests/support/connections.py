"""Whom a process is connected with, by the kernel's own lists."""

from __future__ import annotations

import contextlib
from pathlib import Path

_LISTENS = "0A"


def connections_of(pid: int) -> tuple[set[int], set[int]]:
    """The ports at which a process listens, and those on the other side of the connections that it opened. Connections
    that others opened to it count for neither."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(str(descriptor.readlink()))
    own, pairs = set(), set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" not in sockets:
                continue
            here, there = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            if fields[3] == _LISTENS:
                own.add(here)
            else:
                pairs.add((here, there))
    return own, {there for here, there in pairs if here not in own}
