import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from manager.core import ProbeStatus
from manager.probe import HttpWorkerProbe
from queue_schemas import SessionId, WorkerId

W = WorkerId("w")
ONE = SessionId("w.0000000000000001")


@asynccontextmanager
async def _server(answer: bytes | None) -> AsyncIterator[str]:
    """A server that answers every connection with ``answer``; None: it accepts and keeps silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is not None:
            writer.write(answer)
            await writer.drain()
        else:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def _http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


def _health(worker_id: str, session_id: str) -> bytes:
    return _http(json.dumps({"worker_id": worker_id, "session_id": session_id}).encode())


@pytest.mark.parametrize(
    ("answer", "state", "note"),
    [
        (_health("w", ONE), ProbeStatus.SAME, ""),
        (_health("w", "w.0000000000000002"), ProbeStatus.OTHER, "another session of this worker"),
        (_health("x", "x.0000000000000003"), ProbeStatus.OTHER, "answered by worker 'x'"),
        (_http(b"<html>"), ProbeStatus.UNKNOWN, "no worker of this fabric"),
        (_http(b"[1]"), ProbeStatus.UNKNOWN, "no worker of this fabric"),
        (_http(b"", "302 Found", "location: http://127.0.0.1:1/\r\n"), ProbeStatus.UNKNOWN, "no worker of this fabric"),
        (b"SSH-2.0-x\r\n", ProbeStatus.UNKNOWN, "cannot be asked"),
        (None, ProbeStatus.UNKNOWN, "does not answer in time"),
    ],
)
async def test_who_answers(answer: bytes | None, state: ProbeStatus, note: str) -> None:
    """Only a health page of this very session id is the same; anything odd is no evidence."""
    async with _server(answer) as url, HttpWorkerProbe(0.3) as probe:
        result = await probe.ask(url, W, ONE)
    assert result.status is state
    assert note in result.note


async def test_a_closed_port_refuses() -> None:
    """A refused connection is told from every other failure."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with HttpWorkerProbe(1.0) as probe:
        assert (await probe.ask(f"http://127.0.0.1:{port}", W, ONE)).status is ProbeStatus.REFUSED


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "ftp://127.0.0.1/", "http://no-such-host.invalid/", "http://[::"]
)
async def test_a_url_that_is_none_is_unknown(url: str) -> None:
    """Whatever a worker registers as its URL, looking at it raises nothing and proves nothing."""
    async with HttpWorkerProbe(1.0) as probe:
        assert (await probe.ask(url, W, ONE)).status is ProbeStatus.UNKNOWN


async def test_a_health_page_without_end_is_cut() -> None:
    """Of an endless answer only a bounded part is read."""
    async with _server(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000) as url, HttpWorkerProbe(2.0) as probe:
        assert (await probe.ask(url, W, ONE)).status is ProbeStatus.UNKNOWN
