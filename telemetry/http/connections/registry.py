"""The registry of one server's connections: their maximum number, and the one timer that enforces their time limits."""

from __future__ import annotations

import asyncio
import sys
from typing import Protocol

from ...logs import get_logger
from .cycle import header_line
from .limits import ConnectionLimits

_OTHER_FILES = 128
"""How many of the files that the process may open are kept for other things than connections."""

log = get_logger(__name__)


class OpenConnection(Protocol):
    """What the registry asks of a connection."""

    transport: asyncio.Transport

    def drop(self, why: str) -> None: ...

    def check(self, now_s: float) -> None: ...


class Connections:
    """The open connections of one server. For one event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._most = min(limits.max_connections, _openable_files() - _OTHER_FILES)
        self._open: set[OpenConnection] = set()
        self._idle: dict[OpenConnection, None] = {}
        """Those without a request, by how long they are."""
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._was_late = False
        self._default_headers: list[tuple[bytes, bytes]] = []
        self._default_lines = b""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: OpenConnection) -> bool:
        """One more. At the limit, the one that has been idle for the longest makes room; False if none is idle."""
        if len(self._open) >= self._most:
            if not self._idle:
                log.warning("connection_refused", open=len(self._open), limit=self._most)
                return False
            next(iter(self._idle)).drop("too_many_connections")
        self._open.add(connection)
        if self._timer is None:
            self._sweep_later()
        return True

    def discard(self, connection: OpenConnection) -> None:
        """One is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def idle(self, connection: OpenConnection) -> None:
        """It has no request."""
        self._idle[connection] = None

    def busy(self, connection: OpenConnection) -> None:
        """It has one."""
        self._idle.pop(connection, None)

    def default_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The lines of the ``headers`` that all answers have, a new list each second, with the date."""
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join(header_line(name.lower(), value) for name, value in headers)
        return self._default_lines

    def _sweep(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._due_s > self.limits.sweep_s and not self._was_late:
            self._was_late = True  # the loop stood still: what clients sent meanwhile is still to be read
            self._sweep_later()
            return
        self._was_late = False
        for connection in tuple(self._open):
            try:
                connection.check(now_s)
            except Exception:  # one connection's fault must not keep the others from being checked
                log.exception("connection_not_checked")
                connection.transport.abort()
        self._timer = None
        if self._open:
            self._sweep_later()

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._due_s = loop.time() + self.limits.sweep_s
        self._timer = loop.call_at(self._due_s, self._sweep)


def _openable_files() -> int:
    if sys.platform == "win32":
        return 1 << 30
    import resource  # noqa: PLC0415 - not to be had on Windows

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(soft, 2 * _OTHER_FILES)
