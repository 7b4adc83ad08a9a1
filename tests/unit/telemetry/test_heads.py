"""Heads of requests have limits, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.types import Receive, Scope, Send

from telemetry import heads
from telemetry.server import bind_socket, run_server

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says ok."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server whose heads may take 0.3 s."""
    monkeypatch.setattr(heads, "HEAD_LIMIT_S", 0.3)
    stop = asyncio.Event()
    with bind_socket("127.0.0.1", 0) as listener:
        async with asyncio.TaskGroup() as group:
            group.create_task(run_server(app, sock=listener, stop=stop, lifespan="off", shutdown_limit_s=1.0))
            yield listener.getsockname()[1]
            stop.set()


async def closed(reader: asyncio.StreamReader, limit_s: float = 5.0) -> bool:
    """Whether the server drops the connection without an answer."""
    try:
        async with asyncio.timeout(limit_s):
            return await reader.read() == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("beginning", [b"", b"GET /he", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_is_not_waited_for(port: int, beginning: bytes) -> None:
    """Silence, from the start or in the middle of a head, ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(beginning)
    assert await closed(reader)
    writer.close()


async def test_a_head_without_an_end_is_cut(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header line that goes on and on is dropped long before it fills memory."""
    monkeypatch.setattr(heads, "HEAD_LIMIT_S", 60.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nx: ")
    sent = 0
    try:
        async with asyncio.timeout(10):
            while sent < 64 << 20:
                writer.write(b"a" * 65_536)
                await writer.drain()
                sent += 65_536
    except ConnectionError:
        pass
    assert sent < 16 << 20
    assert await closed(reader)


async def test_requests_on_one_connection_go_on_as_ever(port: int) -> None:
    """Kept connections may be silent between requests, and a later head has the limit again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(10):
        for _ in range(3):
            writer.write(REQUEST)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.4)  # longer than a head may take: nothing has begun
        writer.write(REQUEST[:10])
        assert await closed(reader)
    writer.close()
