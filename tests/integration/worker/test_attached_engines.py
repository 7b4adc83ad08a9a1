"""Attached engines that misbehave, behind a real queue, Manager and worker: what a client is told, and how often the
engine was asked for it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from queue_schemas import Lane, MarkerKind

from .fleet import Client, LocalFleet

MODELS = b'{"object":"list","data":[{"id":"open","object":"model"}]}'
Answer = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, status: bytes = b"200 OK", *lines: bytes) -> bytes:
    head = (b"HTTP/1.1 " + status, b"content-type: application/json", b"content-length: %d" % len(body), *lines)
    return b"\r\n".join([*head, b"", body])


class AttachedEngine:
    """Lists one model, has no /health, refuses request ids that are no UUIDs, and answers each POST as ``answer``
    says, which gets its number (from 1)."""

    def __init__(self, answer: Answer) -> None:
        self.posts: list[float] = []
        self.url = ""
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                await reader.readexactly(int(lines.get(b"content-length", 0)))
                if b"x-request-id" in lines and not _is_uuid(lines[b"x-request-id"].decode()):
                    writer.write(whole(b"", b"400 Bad Request"))
                elif head.startswith(b"GET /v1/models"):
                    writer.write(whole(MODELS))
                elif head.startswith(b"GET"):
                    writer.write(whole(b"", b"404 Not Found"))
                else:
                    self.posts.append(asyncio.get_running_loop().time())
                    await self._answer(len(self.posts), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def _is_uuid(value: str) -> bool:
    try:
        return bool(uuid.UUID(value))
    except ValueError:
        return False


@asynccontextmanager
async def attached(fleet: LocalFleet, client: Client, answer: Answer) -> AsyncIterator[AttachedEngine]:
    """An engine with the only worker that serves it."""
    engine = AttachedEngine(answer)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await fleet.worker("w1", "--engine", "url", "--engine-url", engine.url).until_ready()
    await client.until_listed("w1")
    try:
        yield engine
    finally:
        server.close()


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"503 Service Unavailable"])
async def test_the_only_engines_error_is_passed_on_at_once(fleet: LocalFleet, client: Client, status: bytes) -> None:
    """[C8] One call, no wait; a line of a batch, which nobody asks again, is tried again."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b'{"error": {}}', status) if number < 3 else whole(b"{}"))

    async with attached(fleet, client, answer) as engine:
        refused = await client.ask(model="open")
        assert (refused.status, refused.body, len(engine.posts)) == (int(status[:3]), b'{"error": {}}', 1)
        assert not refused.markers
        line = await client.ask(model="open", lane=Lane.BATCH)
        assert (line.status, len(engine.posts)) == (200, 3)


async def test_an_engine_that_says_when_is_asked_again_then(fleet: LocalFleet, client: Client) -> None:
    """[C8] Neither before nor much later; not at all if the deadline is over by then."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        busy = whole(b"{}", b"503 Service Unavailable", b"Retry-After: 1")
        writer.write(whole(b"{}") if number == 2 else busy)

    async with attached(fleet, client, answer) as engine:
        assert (await client.ask(model="open")).status == 200
        first, second = engine.posts
        assert 1.0 <= second - first < 1.9
        assert (await client.ask(model="open", ttl_ms=900)).status == 503
        assert len(engine.posts) == 3


async def test_a_crashing_engine_is_asked_as_often_as_allowed(fleet: LocalFleet, client: Client) -> None:
    """[C8] [D3] It takes each request and closes the connection a moment later: three attempts are three requests, also
    when the connection was a kept one."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 1:
            writer.write(whole(b"{}"))
        else:
            await asyncio.sleep(0.2)
            writer.close()

    async with attached(fleet, client, answer) as engine:
        assert (await client.ask(model="open")).status == 200
        lost = await client.ask(model="open", max_attempts=3)
        assert [marker.kind for marker in lost.markers] == [MarkerKind.REQUEUED] * 2 + [MarkerKind.DEAD]
        assert len(engine.posts) == 1 + 3


async def test_half_a_stream_is_never_a_whole_one(fleet: LocalFleet, client: Client) -> None:
    """[C3] The engine closes a connection without length and chunks midway, once: the next attempt says all of it."""
    begin = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": null}]}\n\n'
    end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + begin)
        writer.write(end if number > 1 else b"")
        await writer.drain()
        writer.close()

    async with attached(fleet, client, answer) as engine:
        streamed = await client.ask(model="open", stream=True)
        assert [marker.kind for marker in streamed.markers] == [MarkerKind.REQUEUED]
        assert streamed.body == begin + end + b"data: [DONE]\n\n"
        assert len(engine.posts) == 2
        await client.until_nothing_is_left()
