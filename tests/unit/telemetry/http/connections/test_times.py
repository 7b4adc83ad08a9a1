"""How slowly a client may send and read, in each phase of a connection, over raw sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from telemetry.http.connections import ConnectionLimits
from tests.support.sockets import RawClient
from tests.support.waiting import eventually
from tests.unit.telemetry.http.connections.serving import EchoApp, chunked, post, serving

LIMITS = ConnectionLimits(
    head_timeout_s=0.4,
    keep_alive_s=0.4,
    body_idle_timeout_s=0.4,
    write_idle_timeout_s=0.4,
    linger_s=0.4,
    min_transfer_bytes_per_s=1_000,
    settings_prefix="INFERQ_ROUTER_",
)
HEAD = b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n"


@pytest.mark.parametrize(
    "beginning", [b"", b"POST /ec", HEAD, b"\r\n", post("/echo", b"first"), post("/echo", b"first") + b"POST /"]
)
async def test_silence_within_a_head_or_between_requests_ends_the_connection(beginning: bytes) -> None:
    """A connection that sends no request, or not all of its head, is closed; so is one idle between requests."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(beginning)
        if b"first" in beginning:
            assert (await client.answer()).body == b"first"
        assert await client.ended() == b""


@pytest.mark.parametrize("beginning", [b"", b"P", HEAD, b"GET / HTTP/1.1\r\nX: ", post("/echo", b"first") + b"P"])
async def test_a_head_that_trickles_ends_the_connection(beginning: bytes) -> None:
    """A head has so long to arrive, however steadily it comes: request line, headers, and behind an answer."""
    trickle = b"\r\n" if not beginning else b"X"
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(beginning)
        assert await client.send_for_ever(trickle, 1_000, pause_s=0.05) < 200


@pytest.mark.parametrize(
    ("head", "trickle"),
    [
        (post("/echo", b"", "X: y").replace(b"Length: 0", b"Length: 9999"), b""),
        (post("/echo", b"", "X: y").replace(b"Length: 0", b"Length: 9999"), b"x"),
        (chunked("/echo"), b""),
        (chunked("/echo"), b"1\r\nx\r\n"),
        (chunked("/echo"), b"0"),
        (chunked("/echo") + b"1;", b"e"),
        (chunked("/echo") + b"0\r\n", b"X: y\r\n"),
    ],
    ids=["silence", "bytes", "no chunk", "chunks", "a chunk's size", "an extension", "trailers"],
)
async def test_a_body_that_is_silent_or_trickles_gets_408(head: bytes, trickle: bytes) -> None:
    """[B3] [B9] A body below the least rate is refused with 408 that names the setting, and the connection ends."""
    app = EchoApp()
    async with serving(app, LIMITS) as port, RawClient.to(port) as client:
        await client.send(head)
        answer = await client.answer_to_trickle(trickle, pause_s=0.05)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        name = "MIN_TRANSFER_BYTES_PER_S" if trickle else "BODY_IDLE_TIMEOUT_MS"
        assert f"INFERQ_ROUTER_{name}".encode() in answer.body
        assert b"send it again" in answer.body
        await eventually(lambda: not app.open, "the request is over")


async def test_a_steady_body_has_all_the_time_it_needs() -> None:
    """[B3] A body above the least rate passes, though it takes many times the silence that is allowed."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(post("/echo").replace(b"Length: 0", b"Length: 12000"))
        for _ in range(60):
            await client.send(b"x" * 200)
            await asyncio.sleep(0.03)
        assert (await client.answer()).body == b"x" * 12_000


async def test_a_burst_does_not_pay_for_a_trickle() -> None:
    """[B3] The least rate holds over each stretch of time, not over the whole."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(post("/echo").replace(b"Length: 0", b"Length: 999999") + b"x" * 900_000)
        assert (await client.answer_to_trickle(b"x", pause_s=0.05)).status == 408


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_an_answer_that_is_not_read_is_dropped(version: str) -> None:
    """[B2] A client that asks for a large plain answer and reads nothing is cut, and counts until then."""
    app = EchoApp()
    async with serving(app, LIMITS) as port, RawClient.to(port, receive_buffer_bytes=4096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post("/large", version=version))
        await eventually(lambda: app.open == 1, "it is served")
        await asyncio.sleep(0.2)
        assert app.open == 1
        await eventually(lambda: app.open == 0, "it is dropped")


async def test_an_answer_that_is_read_by_the_byte_is_dropped() -> None:
    """[B2] A client that takes a little now and then does not hold an answer for hours."""
    app = EchoApp()
    async with (
        serving(app, replace(LIMITS, min_transfer_bytes_per_s=10_000_000)) as port,
        RawClient.to(port, receive_buffer_bytes=4096) as client,
    ):
        await client.send(post("/large"))
        await eventually(lambda: app.open == 1, "it is served")
        taken = 0
        while app.open:
            taken += len(await client.reader.read(2_000))
            await asyncio.sleep(0.005)
        assert 0 < taken < 20_000_000


async def test_a_slow_reader_that_goes_on_gets_all() -> None:
    """[B2] A client that reads above the least rate gets a large answer whole, though it takes its time."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(post("/large"))
        head = await client.reader.readuntil(b"\r\n\r\n")
        taken = 0
        while taken < 20_000_000 and not client.reader.at_eof():
            taken += len(await client.reader.read(262_144))
            await asyncio.sleep(0.015)
        assert (b" 200 " in head, taken) == (True, 20_000_000)


async def test_an_app_that_does_not_read_yet_is_not_the_clients_fault() -> None:
    """[B3] Time passes for a body only while it is awaited: a client told to wait by 100-continue is not late."""
    app = EchoApp()
    async with serving(app, LIMITS) as port, RawClient.to(port) as client:
        await client.send(post("/wait"))
        await eventually(lambda: app.open == 1, "the first waits")
        await client.send(post("/echo", b"").replace(b"Length: 0", b"Length: 2"))
        await asyncio.sleep(1.0)
        app.go.set()
        assert (await client.answer()).status == 200
        await client.send(b"hi")
        assert (await client.answer()).body == b"hi"
