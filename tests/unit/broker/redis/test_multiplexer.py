"""One connection, many callers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker.redis.link import MultiplexedLink
from broker.redis.multiplexer import MultiplexedConnection
from tests.support.scripted_redis import connection_to, opener, scripted_server
from tests.support.waiting import eventually


async def test_concurrent_commands_get_their_own_replies() -> None:
    """Replies are handed out in the order of the commands, errors among them."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR no\r\n" if command == b"c7" else b"+" + command + b"\r\n")

    async with scripted_server(answer) as port:
        connection = connection_to(port)
        replies = await asyncio.gather(*(connection.command(5, f"c{n}") for n in range(50)), return_exceptions=True)
        assert isinstance(replies.pop(7), ResponseError)
        assert replies == [b"c%d" % n for n in range(50) if n != 7]
        await connection.close()


async def test_a_lost_connection_fails_what_is_under_way_and_the_next_command_connects_again() -> None:
    """Nothing hangs on a connection that is gone, and nothing stays broken."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        if command == b"die":
            writer.close()
        else:
            writer.write(b"+ok\r\n")

    async with scripted_server(answer) as port:
        connection = connection_to(port)
        async with asyncio.timeout(5):
            lost = await asyncio.gather(*(connection.command(5, "die") for _ in range(3)), return_exceptions=True)
            assert all(isinstance(error, RedisConnectionError) for error in lost)
            assert await connection.command(5, "live") == b"ok"
        await connection.close()


async def test_a_reader_hears_that_its_connection_was_lost_between_two_reads() -> None:
    """A server that answers and dies at once was away all the same: whoever follows a stream has to know, once."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+ok\r\n")
        if command == b"last":
            writer.close()

    async with scripted_server(answer) as port:
        link = MultiplexedLink(opener(port), 2)
        async with asyncio.timeout(20):
            assert await link.blocking("stream", 5, "last") == b"ok"
            await eventually(lambda: link._readers._placed["stream"][1]._loss is not None, "the loss is noticed")
            with pytest.raises(RedisConnectionError):
                await link.blocking("stream", 5, "next")
            for _ in range(2):
                assert await link.blocking("stream", 5, "next") == b"ok"
        await link.close()


async def test_an_overdue_reply_fails_and_never_reaches_the_next_caller() -> None:
    """After a time-out the connection is given up: a late reply cannot be taken for another command's."""
    late: list[asyncio.StreamWriter] = []

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        if command == b"slow":
            late.append(writer)
        else:
            writer.write(b"+" + command + b"\r\n")

    async with scripted_server(answer) as port:
        connection = connection_to(port)
        async with asyncio.timeout(10):
            with pytest.raises(RedisTimeoutError):
                await connection.command(0.1, "slow")
            late[0].write(b"+slow\r\n")
            assert await connection.command(5, "next") == b"next"
        await connection.close()


async def test_a_cancelled_caller_leaves_the_others_replies_in_order() -> None:
    """The reply of a caller that left is dropped, not shifted."""
    gate = asyncio.Event()

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(b"+" + command + b"\r\n")

    async with scripted_server(answer) as port:
        connection = connection_to(port)
        calls = [asyncio.create_task(connection.command(5, name)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.05)
        calls[0].cancel()
        gate.set()
        async with asyncio.timeout(5):
            assert [await calls[1], await calls[2]] == [b"b", b"c"]
        await connection.close()


async def test_a_server_that_accepts_but_never_answers_the_log_in_is_given_up() -> None:
    """Connecting has a limit, the handshake included."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = MultiplexedConnection(
            lambda: Connection(
                host="127.0.0.1", port=port, protocol=2, username="u", password="p", socket_timeout=None
            ),
            connect_limit_s=0.2,
        )
        async with asyncio.timeout(5):
            with pytest.raises(TimeoutError):
                await connection.command(5, "PING")
        await connection.close()


async def test_a_write_to_a_connection_that_was_just_closed_is_a_lost_connection() -> None:
    """uvloop says so with an error of its own kind, before the reader has noticed: the call is one to repeat."""

    class Closed(Connection):
        async def connect(self) -> None:
            await super().connect()
            assert self._writer is not None
            self._writer = _ClosedWriter(self._writer)  # type: ignore[assignment]

    class _ClosedWriter:
        def __init__(self, writer: asyncio.StreamWriter) -> None:
            self._writer = writer
            self.transport = _ClosedTransport(writer.transport)

    class _ClosedTransport:
        def __init__(self, transport: asyncio.WriteTransport) -> None:
            self._transport = transport

        def __getattr__(self, name: str) -> object:
            return getattr(self._transport, name)

        def write(self, data: bytes) -> None:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    async def pong(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+PONG\r\n")

    async with scripted_server(pong) as port, asyncio.timeout(5):
        connection = connection_to(port, Closed)
        with pytest.raises(RedisConnectionError, match="handler is closed"):
            await connection.command(2, "PING")
        with pytest.raises(RedisConnectionError, match="handler is closed"):
            await connection.pipeline(60, [("PING",), ("PING",)])
        await connection.close()


async def test_a_command_that_cannot_be_packed_shifts_no_reply() -> None:
    """Nothing of it is sent, nor of its pipeline."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+" + command + b"\r\n")

    async with scripted_server(answer) as port, asyncio.timeout(5):
        connection = connection_to(port)
        for _ in range(2):
            with pytest.raises(TypeError):
                await connection.command(5, "bad", object())
            with pytest.raises(TypeError):
                await connection.pipeline(5, [("good",), ("bad", object())])
            assert await connection.command(5, "next") == b"next"
        await connection.close()


async def test_what_is_no_reply_ends_the_connection_at_once() -> None:
    """[H46] Another server's words, or half of something: what is under way fails now, not when its time is up, and the
    next command has a connection of its own."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" if command == b"bad" else b"+ok\r\n")

    async with scripted_server(answer) as port:
        connection = connection_to(port)
        async with asyncio.timeout(5):
            with pytest.raises(RedisError):
                await connection.command(60, "bad")
            assert await connection.command(60, "good") == b"ok"
        await connection.close()
