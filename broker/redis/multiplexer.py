"""Share one connection between many callers: commands are pipelined as they come, replies returned in order.

redis-py opens the connection (TLS, ACL, Sentinel), and is put aside once it is logged in: what it does for each command
of each caller is most of a command's cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from .channel import Channel


class MultiplexedConnection:
    """A connection that any number of tasks may use at once. It connects at the first command, and again after a loss.

    ``open_connection`` makes an unconnected redis-py connection without a socket time-out of its own. Connecting, with
    its log-in, may take ``connect_limit_s``. A lost connection or an overdue reply fails every command
    under way: whether the server ran them is unknown. A connection whose server became a replica counts as lost.

    A reply is overdue when nothing has moved for the command's ``limit_s``: neither bytes of replies nor bytes that the
    server takes. A slow link may take longer, at ``channel.LEAST_BYTES_PER_S`` and for ``channel.LONGEST_S`` at most.
    """

    def __init__(self, open_connection: Callable[[], AbstractConnection], connect_limit_s: float) -> None:
        self._open_connection = open_connection
        self._connect_limit_s = connect_limit_s
        self._connecting = asyncio.Lock()
        self._channel: Channel | None = None
        self._loss: Exception | None = None

    def take_loss(self) -> Exception | None:
        """The error with which the connection was lost while no command was under way, returned once; else None."""
        loss, self._loss = self._loss, None
        return loss

    async def command(self, limit_s: float, *args: Any) -> Any:
        """Send a command and await its reply. Raises redis-py's exceptions."""
        channel = self._channel
        if channel is None or channel.is_full:
            channel = await self._ready()
        return await channel.send(limit_s, hiredis.pack_command(args))

    async def pipeline(self, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send ``commands`` in one piece, all on the same connection, and await their replies. What the server refuses
        is a ``ResponseError`` in place of a reply; a lost connection is raised."""
        packed = [hiredis.pack_command(tuple(command)) for command in commands]  # all of them, or none is sent
        channel = self._channel
        if channel is None or channel.is_full:
            channel = await self._ready()
        futures = [channel.send(limit_s, command) for command in packed]
        replies = await asyncio.gather(*futures, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, ResponseError):
                raise reply
        return list(replies)

    async def close(self) -> None:
        """Close the connection; commands under way fail. It opens again when it is used."""
        channel = self._channel
        if channel is not None:
            channel.lose(RedisConnectionError("the connection was closed"))
            await asyncio.wait([channel.closed], timeout=self._connect_limit_s)

    async def _ready(self) -> Channel:
        """An open connection with room for a command."""
        while True:
            channel = self._channel or await self._connect()
            if not channel.is_full:
                return channel
            await channel.room.wait()

    async def _connect(self) -> Channel:
        async with self._connecting:
            if self._channel is None:
                connection = self._open_connection()
                try:
                    async with asyncio.timeout(self._connect_limit_s):
                        await connection.connect()  # type: ignore[no-untyped-call]
                        self._channel = await _take_over(connection, self._on_lost)
                finally:
                    _discard(connection)
            return self._channel

    def _on_lost(self, error: Exception, was_idle: bool) -> None:
        self._channel = None
        self._loss = error if was_idle else None


class KeyedConnections:
    """Connections that one key each uses, to the place that holds the key now."""

    def __init__(self) -> None:
        self._placed: dict[str, tuple[str, MultiplexedConnection]] = {}

    async def at(self, key: str, place: str, make: Callable[[], MultiplexedConnection]) -> MultiplexedConnection:
        """The connection of ``key``, made if there is none to ``place``."""
        placed = self._placed.get(key)
        if placed is not None and placed[0] == place:
            return placed[1]
        self._placed[key] = (place, make())
        if placed is not None:
            await placed[1].close()
        return self._placed[key][1]

    async def blocking(
        self, key: str, place: str, make: Callable[[], MultiplexedConnection], limit_s: float, *args: Any
    ) -> Any:
        """Send a command that may block on the server. A loss since the last one is raised, once."""
        connection = await self.at(key, place, make)
        if (loss := connection.take_loss()) is not None:
            # Not one to pass over by connecting again: the server may have lost its latest writes since.
            raise loss
        try:
            return await connection.command(limit_s, *args)
        except asyncio.CancelledError:
            # The command still blocks on the server: its connection is of no more use.
            if self._placed.get(key) == (place, connection):
                del self._placed[key]
            await connection.close()
            raise

    async def forget(self, key: str) -> None:
        """Close that of ``key``."""
        if (placed := self._placed.pop(key, None)) is not None:
            await placed[1].close()

    async def close(self) -> None:
        """Close all; each opens again when it is used."""
        await asyncio.gather(*(connection.close() for _, connection in list(self._placed.values())))


async def _take_over(connection: AbstractConnection, on_lost: Callable[[Exception, bool], None]) -> Channel:
    """Put the reader and writer of redis-py aside: its connection is logged in, and no reply is under way."""
    reader, writer = connection._reader, connection._writer
    if reader is None or writer is None or reader.at_eof() or writer.transport.is_closing():
        raise RedisConnectionError("the server closed the connection")
    reader.feed_eof()
    if await reader.read():
        raise RedisConnectionError("the server sent a reply that nobody asked for")
    channel = Channel(writer, connection._parser.parse_error, on_lost)
    connection._reader = connection._writer = None
    return channel


def _discard(connection: AbstractConnection) -> None:
    """Close what was not taken over, without waiting."""
    writer, connection._reader, connection._writer = connection._writer, None, None
    if writer is not None:
        writer.transport.abort()
