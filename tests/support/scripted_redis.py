"""Servers that speak RESP just as a test says: slow, broken, silent or hostile."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from broker.redis.multiplexer import MultiplexedConnection

_HANDSHAKE = (b"CLIENT", b"SELECT", b"HELLO")
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def command(self) -> list[bytes]:
        """The next command behind the log-in, which is answered here. Raises ``EOFError`` at the end."""
        while True:
            line = await self.reader.readline()
            if not line:
                raise EOFError
            args = []
            for _ in range(int(line[1:])):
                size = int((await self.reader.readline())[1:])
                args.append((await self.reader.readexactly(size + 2))[:-2])
            if args[0] not in _HANDSHAKE:
                return args
            self.writer.write(b"+OK\r\n")


@asynccontextmanager
async def peer_server(
    serve: Callable[[Peer], Awaitable[None]], *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server on loopback that runs ``serve`` for each connection; yields its port."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await serve(Peer(reader, writer))
        except (ConnectionError, EOFError, asyncio.CancelledError):
            return
        finally:
            writer.transport.abort()

    tasks: set[Any] = set()
    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def scripted_server(answer: Answer) -> AsyncIterator[int]:
    """A server that calls ``answer`` with the first argument of each command behind the log-in."""

    async def serve(peer: Peer) -> None:
        while True:
            await answer((await peer.command())[0], peer.writer)

    async with peer_server(serve) as port:
        yield port


def opener(port: int, make: type[Connection] = Connection, **options: Any) -> Callable[[], Connection]:
    """Makes redis-py connections as the broker's are made."""

    def open_connection() -> Connection:
        return make(
            **{"host": "127.0.0.1", "port": port, "protocol": 2, "retry": Retry(NoBackoff(), 0)} | options,
            socket_timeout=None,
        )

    return open_connection


def connection_to(port: int, make: type[Connection] = Connection, **options: Any) -> MultiplexedConnection:
    """A multiplexed connection to a server of this module."""
    return MultiplexedConnection(opener(port, make, **options), connect_limit_s=2)
