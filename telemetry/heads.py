"""Limits on the head of a request, which uvicorn has not: no stranger may fill memory or hold a connection with it."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT_S = 10.0
"""How long a request's head may take to arrive, and a new connection to send its first."""
HEAD_LIMIT_BYTES = 64 * 1024
"""How much of a head may arrive without its end."""


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which drops a connection whose head is late or too long.

    One timer a connection, and another only for a head that comes in pieces: a request that arrives whole sets none.
    """

    _in_head = True
    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_LIMIT_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_LIMIT_BYTES:
            self.transport.abort()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_LIMIT_S, self.transport.abort)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._forget()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
