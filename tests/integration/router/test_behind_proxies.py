"""A Router behind real nginx and HAProxy, whose few kept connections all clients share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.support.queue import MODEL
from tests.support.reverse_proxies import PROXIES, proxy_before
from tests.support.smuggling import PAIRS
from tests.support.sockets import RawClient
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue

from .harness import fake_router

VICTIM = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %b\r\n\r\n"
CHAT = b"/v1/chat/completions"


@pytest.fixture(params=PROXIES)
async def ways(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[FakeQueue, int]]:
    """A Router's queue, and the port of a proxy in front of it."""
    queue = FakeQueue(MODEL)
    async with fake_router(queue, body_idle_timeout_ms=200) as port:
        with proxy_before(port, request.param, tmp_path) as proxied:
            yield queue, proxied


def aimed(request: bytes) -> bytes:
    """One of the pairs, sent to an inference path."""
    return request.replace(b" /echo ", b" %b " % CHAT).replace(b"evil/echo ", b"evil%b " % CHAT)


async def attack(port: int, request: bytes) -> None:
    async with RawClient.to(port, limit_s=1.0) as client:
        try:
            async with asyncio.timeout(0.4):
                await client.send(request)
                while await client.reader.read(65_536):
                    continue
        except (ConnectionError, TimeoutError):
            return  # whatever it is told is its own


async def test_bytes_of_one_client_never_become_anothers_request(ways: tuple[FakeQueue, int]) -> None:
    """[B4] Requests that parsers may disagree about, before and among those of others on the same kept connections:
    each of the others gets the whole answer to its own request, and nothing hidden is asked."""
    queue, port = ways
    attacks = asyncio.Semaphore(16)

    async def attacking(name: str) -> None:
        async with attacks:
            await attack(port, aimed(PAIRS[name]))

    attackers = [asyncio.ensure_future(attacking(name)) for name in PAIRS]
    served = 0
    async with RawClient.to(port) as victim:
        while not all(attacker.done() for attacker in attackers) or served < 50:
            served += 1
            name = b"victim-%d" % served
            await victim.send(VICTIM % name)
            answer = await victim.answer()
            assert (answer.status, answer.headers["x-request-id"]) == (200, name.decode())
            assert [model["id"] for model in orjson.loads(answer.body)["data"]] == [MODEL]
            await asyncio.sleep(0.005)
    await asyncio.gather(*attackers)
    assert queue.enqueued.empty()


async def test_a_refused_body_does_not_spoil_a_shared_connection(ways: tuple[FakeQueue, int]) -> None:
    """[B1] [B3] Bodies that are refused as they arrive, that stop or break off: the next clients are served."""
    _, port = ways
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"

    async def spoil(size: int, sent: int) -> None:
        async with RawClient.to(port) as client:
            await client.send(head % (CHAT, size))
            await client.send(b"{" * sent)
            await asyncio.sleep(0.1)

    for _ in range(3):
        await asyncio.gather(spoil(200_000_000, 1_000), spoil(10_000, 100), spoil(5_000_000, 2_000_000))
        async with RawClient.to(port) as victim:
            await victim.send(VICTIM % b"after")
            answer = await victim.answer()
            assert (answer.status, answer.headers["x-request-id"]) == (200, "after")


async def test_an_upgrade_offer_and_a_close_are_passed_through(ways: tuple[FakeQueue, int]) -> None:
    """[B4] [B6] Behind a proxy, too, an offer is ignored, and a client that closes has its job aborted."""
    queue, port = ways
    body = orjson.dumps({"model": MODEL, "messages": [], "stream": True})
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" % CHAT
    async with RawClient.to(port) as client:
        await client.send(head + b"Content-Length: %d\r\n\r\n" % len(body))
        await asyncio.sleep(0.05)
        await client.send(body)
        job = await queue.job()
        assert job.body == body
        queue.stream(job, b"data: {}\n\n", end=False)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await eventually(lambda: not queue.cancelled.empty(), "the job is cancelled")
