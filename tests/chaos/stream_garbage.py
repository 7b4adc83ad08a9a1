"""Write garbage straight into the queue's streams, as anyone with access to Redis could."""

from __future__ import annotations

import asyncio
import random

from redis.asyncio import Redis

from broker import Broker, BrokerSettings
from queue_schemas import Job, Pool, Tenant, new_job_id
from queue_schemas.keys import ShardKeys
from tests.support.servers import Server

from .workload import MODEL

ATTEMPTS = 2
"""Maximum attempts of the job that no worker can read."""
_KEYS = ShardKeys(0)
_RANDOM = random.Random(0)
_PIECES: tuple[bytes, ...] = (
    b"",
    b"\x00",
    _RANDOM.randbytes(300),
    b"\x91" * 5_000,
    b"\xdf\xff\xff\xff\xff",
    b"\xc4\xff",
    b"x" * (2 << 20),
)
"""Nothing, noise, depth without end, counts and lengths that lie, size."""
_MARKERS: tuple[bytes, ...] = (b"", b"lost", b"lost x y", b"dead \xff\xff 1 why", b"requeued 0-x -1 ", b"void a 1 b")
_CONTROL: tuple[dict[bytes, bytes], ...] = (
    {b"k": b"abort"},
    {b"k": b"abort", b"job": b"\xff\xfe", b"why": b"x"},
    {b"k": b"explode"},
    {b"k": b""},
    {b"\xff": b"\xff"},
)
_DROP = "redis.call('XDEL', KEYS[1], ARGV[1]) if redis.call('XLEN', KEYS[1]) == 0 then redis.call('DEL', KEYS[1]) end"


class _Unreadable(Job):
    """A job whose envelope no worker can read."""

    def pack(self) -> bytes:
        return b"\xc1" + b"\x91" * 64


async def write_garbage(server: Server, duration_s: float) -> None:
    """Write all of it; remove what is left in the waiting streams after ``duration_s``."""
    async with server.client() as client:
        for key in await client.keys(_pattern("reply:*")):
            for piece in _PIECES:
                await client.xadd(key, {b"f": piece}, nomkstream=True)
            for marker in _MARKERS:
                await client.xadd(key, {b"m": marker}, nomkstream=True)
            await client.xadd(key, {b"?": b"?"}, nomkstream=True)
        for key in await client.keys(_pattern("ctl:*")):
            for message in _CONTROL:
                await client.xadd(key, message, nomkstream=True)
        waiting = [key for pattern in ("retry:*", "suspects:*", "q:*") for key in await client.keys(_pattern(pattern))]
        written = [(key, await client.xadd(key, {b"id": b"\xff no job"}, nomkstream=True)) for key in waiting]
        await _enqueue_unreadable(server)
        await asyncio.sleep(duration_s)
        await _take_out(client, written)


async def _take_out(client: Redis, written: list[tuple[bytes, bytes | None]]) -> None:
    for key, entry in written:
        if entry is not None:
            await client.eval(_DROP, 1, key, entry)


async def _enqueue_unreadable(server: Server) -> None:
    broker = await Broker.connect(BrokerSettings(redis_url=server.url))
    try:
        job = _Unreadable(
            id=new_job_id(0), tenant=Tenant("intruder"), model=Pool(MODEL), path="/v1/chat/completions", body=b"{}",
            max_attempts=ATTEMPTS,
        )  # fmt: skip
        await broker.jobs.enqueue(job)
    finally:
        await broker.close()


def _pattern(name: str) -> str:
    return _KEYS.prefix.replace("{", "[{]") + name
