"""What is left of a connection once it has ended: nothing that only the garbage collector would find, days later."""

from __future__ import annotations

import pytest

from telemetry.http.connections import HttpConnection, RequestCycle
from tests.support.garbage import alive, without_collection
from tests.support.sockets import RawClient
from tests.support.waiting import eventually

from .serving import EchoApp, chunked, post, serving


def open_ones() -> int:
    return alive(HttpConnection, RequestCycle)


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"GET / HTTP/1.1\r\nHo", post("/echo", b"a"), post("/echo", b"a") * 3, post("/stream"), post("/ignore"),
        post("/wait"), chunked("/echo") + b"5\r\nab", b"nonsense\r\n\r\n",
        post("/echo", b"", "Upgrade: h2c", "Connection: upgrade"),
    ],
)  # fmt: skip
async def test_an_ended_connection_is_freed_at_once(sent: bytes) -> None:
    """Idle, within a head, answered, within an answer, within a body, refused."""
    async with serving(EchoApp()) as port:
        with without_collection():
            before = open_ones()
            for _ in range(5):
                async with RawClient.to(port) as client:
                    await client.send(sent)
                    await eventually(lambda: open_ones() > before, "the connection is made")
                await eventually(lambda: open_ones() == before, "the connection is freed")
