"""Accepts connections from a listening socket that several processes share, one by one, so that each gets its part."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from ...logs import get_logger

RETRY_S = 1.0
"""Pause after an accept that failed, as of a process without free file descriptors."""

log = get_logger(__name__)

PauseBeforeAccept = Callable[[int], float]
"""Given how many connections this process has: how many seconds to leave the next one to other processes."""


class SharedAcceptor:
    """Stands in for an asyncio ``Server`` over ``listener``.

    uvloop's own server empties the queue of connections whenever it wakes, so that one process often gets all of a
    burst. This one takes one connection at a time, after the pause that ``pause`` asks for.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        open_connections: Callable[[], int],
        pause: PauseBeforeAccept,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._open_connections = open_connections
        self._pause = pause
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[object]] = set()
        self._closed = False
        self._loop.add_reader(listener, self._on_readable)

    def close(self) -> None:
        """Accept no more, and close the socket of this process. May be repeated."""
        if self._closed:
            return
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._loop.remove_reader(self._listener)
        self._listener.close()

    async def wait_closed(self) -> None:
        """Return at once: :meth:`close` has closed the socket."""

    def _on_readable(self) -> None:
        pause_s = self._pause(self._open_connections() + len(self._opening))
        if pause_s > 0:
            self._wait(pause_s)
        else:
            self._accept()

    def _wait(self, pause_s: float) -> None:
        self._loop.remove_reader(self._listener)
        self._waiting = self._loop.call_later(pause_s, self._after_pause)

    def _after_pause(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener, self._on_readable)
        self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process was faster, or the client has left
            return
        except OSError as error:
            log.error("accept_failed", error=str(error), retry_in_s=RETRY_S)
            self._wait(RETRY_S)
            return
        connection.setblocking(False)
        opening = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make_protocol, connection), name="connection"
        )
        self._opening.add(opening)
        opening.add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Task[object]) -> None:
        self._opening.discard(opening)
        if not opening.cancelled() and (error := opening.exception()) is not None:
            log.warning("connection_not_opened", error=repr(error))
