"""Share one connection between many callers: commands are pipelined as they come, replies returned in order.

redis-py opens the connection (TLS, ACL, Sentinel) and parses replies; what it does for each command of each caller,
checking a connection out and in, timing it, retrying, is left out, because that is most of a command's cost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

_WATCH_EVERY_S = 0.5
BECAME_REPLICA = (ReadOnlyError, MasterDownError)
"""What a server answers that is no primary any more."""


class MultiplexedConnection:
    """A connection that any number of tasks may use at once. It connects at the first command, and again after a loss.

    ``open_connection`` makes an unconnected redis-py connection without a socket time-out of its own. Connecting, with
    its log-in, may take ``connect_limit_s``. A lost connection or an overdue reply fails every command
    under way: whether the server ran them is unknown. A connection whose server became a replica counts as lost.
    """

    def __init__(self, open_connection: Callable[[], AbstractConnection], connect_limit_s: float) -> None:
        self._open_connection = open_connection
        self._connect_limit_s = connect_limit_s
        self._connection: AbstractConnection | None = None
        self._connecting = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._awaited: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._loss: Exception | None = None

    def take_loss(self) -> Exception | None:
        """The error with which the connection was lost while no command was under way, returned once; else None."""
        loss, self._loss = self._loss, None
        return loss

    async def command(self, limit_s: float, *args: Any) -> Any:
        """Send a command and await its reply, at most ``limit_s`` seconds. Raises redis-py's exceptions."""
        connection = self._connection
        if connection is None or not connection.is_connected:
            connection = await self._connect()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._awaited.append((time.monotonic() + limit_s, future))
        if self._watch is None:
            self._watch = loop.call_later(_WATCH_EVERY_S, self._look_for_overdue)
        # Nothing is awaited between the append and the write inside this call: replies come in the same order.
        try:
            await _send(connection, hiredis.pack_command(args))
        except BaseException:
            future.cancel()
            raise
        return await future

    async def pipeline(self, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send ``commands`` in one piece, all on the same connection, and await their replies, at most ``limit_s``
        seconds. What the server refuses is a ``ResponseError`` in place of a reply; a lost connection is raised."""
        connection = self._connection
        if connection is None or not connection.is_connected:
            connection = await self._connect()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self._awaited.extend((time.monotonic() + limit_s, future) for future in futures)
        if self._watch is None:
            self._watch = loop.call_later(_WATCH_EVERY_S, self._look_for_overdue)
        try:
            await _send(connection, b"".join(map(hiredis.pack_command, map(tuple, commands))))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        replies = await asyncio.gather(*futures, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, ResponseError):
                raise reply
        return list(replies)

    async def close(self) -> None:
        """Close the connection; commands under way fail."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await self._lose(RedisConnectionError("the connection was closed"))

    async def _connect(self) -> AbstractConnection:
        async with self._connecting:
            if self._connection is not None and self._connection.is_connected:
                return self._connection
            if self._reader is not None:
                await asyncio.gather(self._reader, return_exceptions=True)
            connection = self._open_connection()
            connect: Callable[[], Awaitable[None]] = connection.connect
            async with asyncio.timeout(self._connect_limit_s):
                await connect()
            self._connection = connection
            self._reader = asyncio.create_task(self._read(connection))
            return connection

    async def _read(self, connection: AbstractConnection) -> None:
        """Hand replies to those who await them until the connection is lost."""
        try:
            while True:
                try:
                    reply = await connection.read_response(disable_decoding=True, timeout=math.inf)
                except ResponseError as error:
                    _, future = self._awaited.popleft()
                    if not future.done():
                        future.set_exception(error)
                    if isinstance(error, BECAME_REPLICA):
                        # It keeps its connections, while its name may lead to the new primary by now.
                        await self._lose(RedisConnectionError("the server became a replica"))
                        return
                else:
                    _, future = self._awaited.popleft()
                    if not future.done():
                        future.set_result(reply)
        except (RedisError, OSError) as error:  # also what is no reply at all
            await self._lose(error)
        except IndexError:
            await self._lose(RedisConnectionError("the server sent a reply that nobody asked for"))

    async def _lose(self, error: Exception) -> None:
        connection, self._connection = self._connection, None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        lost, self._awaited = self._awaited, deque()
        self._loss = None if lost else error
        for _, future in lost:
            if not future.done():
                future.set_exception(error)
        if connection is not None:
            _abort(connection)
            await connection.disconnect(nowait=True)

    def _look_for_overdue(self) -> None:
        """One timer watches all commands: the connection is abandoned when any reply is overdue."""
        self._watch = None
        if not self._awaited:
            return
        now = time.monotonic()
        if any(due < now for due, _ in self._awaited):
            self._abandon_connection()
            return
        self._watch = asyncio.get_running_loop().call_later(_WATCH_EVERY_S, self._look_for_overdue)

    def _abandon_connection(self) -> None:
        """Fail what is under way. Cancelling the reader makes redis-py close the socket."""
        lost, self._awaited = self._awaited, deque()
        for _, future in lost:
            if not future.done():
                future.set_exception(RedisTimeoutError("Redis did not answer in time"))
        if self._connection is not None:
            _abort(self._connection)
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        self._connection = None


async def _send(connection: AbstractConnection, packed: bytes) -> None:
    try:
        await connection.send_packed_command(packed, check_health=False)
    except (RuntimeError, AttributeError) as error:
        # What uvloop raises for a transport that the server has closed before the reader was told so, and redis-py for
        # a connection that was closed while this command waited to be sent.
        raise RedisConnectionError(f"the connection was closed: {error}") from error


def _abort(connection: AbstractConnection) -> None:
    """Drop what was not sent yet: closing alone would deliver it later, when its commands have long been repeated."""
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    if writer is not None:
        writer.transport.abort()
