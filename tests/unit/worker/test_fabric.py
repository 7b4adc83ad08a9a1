"""The worker's calls to its Manager."""

from __future__ import annotations

import asyncio

from queue_schemas import Assignment, Incarnation, Registration, RegistrationAnswer
from worker.fabric import FabricClient


async def test_an_answer_that_comes_in_pieces_is_read_whole() -> None:
    """A long registration answer arrives in several segments; it is one message all the same."""
    answer = RegistrationAnswer(
        broker_url="redis://" + "r" * 80_000,
        shards=1,
        lease_ms=15_000,
        heartbeat_ms=2_000,
        assignment=Assignment(term=1, version=1),
    )
    body = answer.model_dump_json().encode()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 20_000):
            await asyncio.sleep(0.02)  # so that the pieces are segments of their own
            writer.write(body[start : start + 20_000])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    client = FabricClient([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
    try:
        registration = Registration(worker_id="w1", incarnation=Incarnation("w1.0123456789abcdef"), slots=1)
        assert await client.register(registration) == answer
    finally:
        await client.close()
        server.close()
