"""The edge of a Router over raw sockets: what clients do to it, and what becomes of their jobs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.support.queue import MODEL
from tests.support.sockets import RawClient
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue

from .harness import fake_router

CHAT = orjson.dumps({"model": MODEL, "messages": []})
STREAM = orjson.dumps({"model": MODEL, "messages": [], "stream": True})
KEYS = ",".join(f"{hashlib.sha256(name).hexdigest()}:{name.decode()}" for name in (b"acme", b"rival"))


def post(
    body: bytes, *headers: str, path: str = "/v1/chat/completions", length: int | None = None, version: str = "1.1"
) -> bytes:
    length = len(body) if length is None else length
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue(MODEL)


async def test_an_unread_plain_answer_counts_until_it_is_cut(queue: FakeQueue) -> None:
    """[B2] [B9] It counts among its tenant's bytes and requests; the client is dropped after its stall timeout."""
    limits = {"client_stall_timeout_ms": 1_000, "max_body_bytes": 1 << 20, "max_tenant_inflight_body_bytes": 1 << 21}
    async with (
        fake_router(queue, api_keys=KEYS, **limits) as port,
        RawClient.to(port, receive_buffer_bytes=4096) as unread,
        RawClient.to(port) as again,
        RawClient.to(port) as other,
    ):
        unread.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await unread.send(post(CHAT, "Authorization: Bearer acme"))
        queue.answer(await queue.job(), b"x" * 20_000_000)
        await asyncio.sleep(0.2)
        await again.send(post(CHAT, "Authorization: Bearer acme"))
        assert (await again.answer()).status == 429
        await other.send(post(CHAT, "Authorization: Bearer rival"))
        queue.answer(await queue.job(), b"{}")
        assert (await other.answer()).status == 200

        async def served() -> bool:
            await again.send(post(CHAT, "Authorization: Bearer acme"))
            if queue.enqueued.empty():
                await asyncio.sleep(0.1)
            if not queue.enqueued.empty():
                queue.answer(await queue.job(), b"{}")
            return (await again.answer()).status == 200

        await eventually(served, "the room is free again")


async def test_a_stream_over_http_1_0_has_no_chunk_sizes(queue: FakeQueue) -> None:
    """[B5] Comments, pieces and the end are the stream's own bytes; the connection ends with it. So does an error's."""
    async with fake_router(queue, keepalive_interval_ms=50, sweep_interval_ms=10) as port:
        async with RawClient.to(port) as client:
            await client.send(post(STREAM, "Connection: keep-alive", version="1.0"))
            job = await queue.job()
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"transfer-encoding" not in head.lower()
            await client.reader.readuntil(b"\n")
            queue.stream(job, b"data: 1\n\n", b"data: [DONE]\n\n")
            lines = (await client.ended()).split(b"\n")
            assert [line for line in lines if line and not line.startswith(b":")] == [b"data: 1", b"data: [DONE]"]
        async with RawClient.to(port) as client:
            await client.send(post(b"{", version="1.0"))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert await client.ended() == b""


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize(
    "behind", [b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /v1", post(CHAT) * 400]
)
async def test_a_client_that_closes_has_its_job_aborted(queue: FakeQueue, body: bytes, behind: bytes) -> None:
    """[B6] Whatever was pipelined behind it."""
    async with fake_router(queue) as port, RawClient.to(port) as client:
        await client.send(post(body))
        job = await queue.job()
        await client.send(behind)
        client.writer.close()
        assert (await queue.cancellation())[0] == job.id


@pytest.fixture
async def uploading(queue: FakeQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[int]:
    """The port of a Router that lets uploads be silent for 300 ms, two at once and one a tenant."""
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "store"))
    limits = {
        "body_idle_timeout_ms": 300,
        "client_stall_timeout_ms": 300,
        "max_concurrent_transfers": 2,
        "max_tenant_concurrent_transfers": 1,
    }
    async with fake_router(queue, api_keys=KEYS, **limits) as port:
        yield port


def form(who: str, data: bytes, length: int | None = None) -> bytes:
    body = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + data + b"\r\n--B--\r\n"
    )
    headers = ("Content-Type: multipart/form-data; boundary=B", f"Authorization: Bearer {who}")
    return post(body, *headers, path="/v1/files", length=length)


@pytest.mark.parametrize("trickle", [b"", b"x"])
async def test_a_slow_upload_is_ended_and_blocks_nobody(uploading: int, trickle: bytes) -> None:
    """[B3] [B9] It gets 408; meanwhile its tenant has no other transfer, and another tenant has."""
    async with RawClient.to(uploading) as slow, RawClient.to(uploading) as same, RawClient.to(uploading) as other:
        await slow.send(form("acme", b"x", length=1_000_000)[:-20])
        await asyncio.sleep(0.05)
        await same.send(form("acme", b"1"))
        refused = await same.answer()
        assert (refused.status, b"max_tenant_concurrent_transfers" in refused.body) == (429, True)
        await other.send(form("rival", b"1"))
        assert (await other.answer()).status == 200
        answer = await slow.answer_to_trickle(trickle, pause_s=0.05)
        assert (answer.status, b"send it again" in answer.body) == (408, True)
    async with RawClient.to(uploading) as again:
        await again.send(form("acme", b"1"))
        assert (await again.answer()).status == 200


async def test_an_unread_download_is_cut(uploading: int) -> None:
    """[B2] A file that is not read holds its transfer no longer than any answer."""
    async with RawClient.to(uploading) as client:
        await client.send(form("acme", b"x" * 12_000_000))
        file_id = orjson.loads((await client.answer()).body)["id"]
    get = f"GET /v1/files/{file_id}/content HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer acme\r\n\r\n".encode()
    async with RawClient.to(uploading, receive_buffer_bytes=4096) as unread, RawClient.to(uploading) as again:
        await unread.send(get)
        assert b" 200 " in await unread.reader.readuntil(b"\r\n\r\n")
        unread.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await again.send(form("acme", b"1"))
        assert (await again.answer()).status == 429

        async def over() -> bool:
            await again.send(form("acme", b"1"))
            return (await again.answer()).status == 200

        await eventually(over, "the download is cut")
