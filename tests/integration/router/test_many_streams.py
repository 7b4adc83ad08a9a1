"""Ten thousand idle streams on one Router process: what each costs, and that it costs no more the longer it lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from broker import Broker, BrokerSettings
from queue_schemas import END, HEAD, Frame, Lease, Outcome
from telemetry.environment import free_port
from tests.support.processes import Child, answers, role_starter
from tests.support.queue import MODEL, Puller
from tests.support.servers import Server

from .harness import PATH, SSE, STREAM

CLIENTS = 10_000
MOST_BYTES_EACH = 30_000
AT_ONCE = 500
COMMENT_MS = 1_000
FIRST = b'data: {"n":1}\n\n'


@pytest.fixture
def router(tmp_path: Path, valkey: Server) -> Iterator[tuple[Child, int]]:
    """A Router process, and its port."""
    port = free_port()
    flags = ("--max-concurrent-requests", str(2 * CLIENTS), "--keepalive-interval-ms", str(COMMENT_MS))
    with role_starter("router.service", tmp_path) as start:
        child = start("--port", str(port), "--redis-url", valkey.url, "--pools", MODEL, *flags)
        child.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 20)
        yield child, port


class Stream:
    """A client that reads as little as it must."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, port: int) -> Stream:
        stream = cls(*await asyncio.open_connection("127.0.0.1", port))
        body = orjson.dumps(STREAM)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        stream.writer.write(head.encode() + body)
        return stream

    async def until(self, end: bytes) -> None:
        async with asyncio.timeout(60):
            await self._reader.readuntil(end)


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


async def _claim_all(puller: Puller) -> list[Lease]:
    leases: list[Lease] = []
    while len(leases) < CLIENTS:
        leases += await puller.claim(32)
    return leases


@pytest.mark.timeout(240)
async def test_ten_thousand_idle_streams(router: tuple[Child, int], valkey: Server) -> None:
    """Each under 30 kB, in the queue and while it is answered, however often it got a comment; all end whole."""
    child, port = router
    before = resident_bytes(child.pid)
    streams: list[Stream] = []
    for _ in range(CLIENTS // AT_ONCE):
        streams += await asyncio.gather(*(Stream.to(port) for _ in range(AT_ONCE)))
    broker = await Broker.connect(BrokerSettings(redis_url=valkey.url, retry_limit_ms=20_000))
    try:
        leases = await _claim_all(await Puller(broker).join())
        for start in range(0, CLIENTS, AT_ONCE):
            some = leases[start : start + AT_ONCE]
            frames = [Frame(one.job.id, one.epoch, one.attempt_id, 0, HEAD, FIRST, 200, SSE).pack() for one in some]
            await broker.attempts.publish(0, {some[0].job.reply_to: b"".join(frames)})
        await asyncio.gather(*(stream.until(FIRST) for stream in streams))
        begun = resident_bytes(child.pid)
        for _ in range(3):
            await asyncio.gather(*(stream.until(b": queued\n") for stream in streams))
        idle = resident_bytes(child.pid)
        assert (begun - before) / CLIENTS < MOST_BYTES_EACH
        assert (idle - begun) / CLIENTS < MOST_BYTES_EACH / 10

        async def settle(lease: Lease) -> None:
            end = Frame(lease.job.id, lease.epoch, lease.attempt_id, 1, END, b"data: [DONE]\n\n").pack()
            await broker.attempts.settle(lease, Outcome.DONE, end)

        for start in range(0, CLIENTS, AT_ONCE):
            await asyncio.gather(*map(settle, leases[start : start + AT_ONCE]))
        await asyncio.gather(*(stream.until(b"data: [DONE]\n\n\r\n0\r\n\r\n") for stream in streams))
    finally:
        await broker.close()
        for stream in streams:
            stream.writer.transport.abort()
