"""Workers whose link to the queue is narrow or comes in single bytes, and events as large as they get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Server

from .fleet import LEASE_MS, Client, LocalFleet
from .test_attached_engines import Answer, AttachedEngine, whole

MBIT_PER_S = 125_000.0
"""Bytes a second of a link of 1 Mbit/s."""
MIB = 1 << 20


@pytest.fixture
async def link(valkey: Server) -> AsyncIterator[FaultProxy]:
    """What the worker reaches the queue through."""
    async with FaultProxy(valkey.port, buffer_bytes=8_192) as proxy:
        yield proxy


async def worker_behind(link: FaultProxy, fleet: LocalFleet, client: Client, answer: Answer) -> asyncio.Server:
    """An engine that answers so, and its worker, ready."""
    engine = AttachedEngine(answer)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await fleet.worker("w1", "--engine", "url", "--engine-url", url, "--redis-url", link.url).until_ready()
    await client.until_listed("w1")
    return server


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def streams(writer: asyncio.StreamWriter, events: list[bytes], every_s: float) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for event in events:
        writer.write(chunk(event))
        await writer.drain()
        await asyncio.sleep(every_s)
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def test_a_large_job_on_a_narrow_link_costs_no_lease(link: FaultProxy, fleet: LocalFleet, client: Client) -> None:
    """512 KiB take four seconds at 1 Mbit/s, two leases: they arrive with one attempt, and so does an answer of that
    size; a stream beside it goes on."""
    size = MIB // 2
    small = [b'data: {"n": %d}\n\n' % number for number in range(20)]

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        if number == 2:  # the stream overtakes it
            writer.write(whole(b'{"text": "%b"}' % (b"x" * size)))
        else:
            await streams(writer, small, 0.1)

    server = await worker_behind(link, fleet, client, answer)
    link.bytes_per_s = MBIT_PER_S
    began = time.monotonic()
    large = await client.send(model="open", max_attempts=1, order={"pad": "x" * size})
    stream = await client.send(model="open", stream=True, max_attempts=1)
    got = await client.answer(large, limit_s=60)
    assert (got.status, len(got.body), got.markers) == (200, size + 12, [])
    assert time.monotonic() - began > 2 * LEASE_MS / 1000
    told = await client.answer(stream, limit_s=60)
    assert (told.body, told.markers) == (b"".join(small) + b"data: [DONE]\n\n", [])
    link.bytes_per_s = 0.0
    server.close()


async def test_a_queue_that_speaks_in_single_bytes_is_understood(
    link: FaultProxy, fleet: LocalFleet, client: Client
) -> None:
    """Every reply and every command of a worker comes byte by byte: nothing is lost, repeated or mixed up."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        await streams(writer, [b'data: {"n": %d}\n\n' % step for step in range(5)], 0.05)

    server = await worker_behind(link, fleet, client, answer)
    link.slice_bytes = 1
    jobs = [await client.send(model="open", stream=True, max_attempts=1) for _ in range(8)]
    for job in jobs:
        got = await client.answer(job, limit_s=60)
        assert got.body == b"".join(b'data: {"n": %d}\n\n' % step for step in range(5)) + b"data: [DONE]\n\n"
        assert not got.markers
    link.slice_bytes = 0
    server.close()


@pytest.mark.parametrize("size", [MIB - 100, 2 * MIB])
async def test_events_of_a_mebibyte_arrive_whole(
    link: FaultProxy, fleet: LocalFleet, client: Client, size: int
) -> None:
    """Just below the size up to which an event is held until it is whole, and above it, with small ones between."""
    events = [piece for n in range(8) for piece in (b"data: %b\n\n" % (b"%d" % n * size), b"data: small\n\n")]

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        await streams(writer, events, 0.01)

    server = await worker_behind(link, fleet, client, answer)
    first, second = [await client.send(model="open", stream=True, max_attempts=1) for _ in range(2)]
    for job in (first, second):
        got = await client.answer(job, limit_s=60)
        assert got.body == b"".join(events) + b"data: [DONE]\n\n" and not got.markers
    server.close()
