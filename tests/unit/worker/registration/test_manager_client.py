"""The worker's calls to its Manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from queue_schemas import (
    JOIN_TOKEN_HEADER,
    Assignment,
    AuthenticationFailed,
    Heartbeat,
    ManagerUnavailable,
    Pool,
    PoolAssignment,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
)
from worker.registration import manager_client as fabric
from worker.registration.addresses import Addresses
from worker.registration.manager_client import ManagerClient

SESSION_ID = SessionId("w1.0123456789abcdef")
REGISTRATION = Registration(worker_id="w1", session_id=SESSION_ID, slots=1)


@asynccontextmanager
async def answering(status: int, body: bytes = b"", *, hang: bool = False) -> AsyncIterator[str]:
    """A server that answers everything with this, or never; its URL."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if hang:
            return
        writer.write(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (status, len(body)))
        writer.write(body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def beat() -> Heartbeat:
    return Heartbeat(session_id=SESSION_ID, slots=1)


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("body", [UnknownWorker("who?").body(), b'{"detail":"Not Found"}', b""])
async def test_a_heartbeat_that_nobody_knows_means_register_again(status: int, body: bytes) -> None:
    """404 or 410, with our error object or with none: for a heartbeat it is all the same."""
    async with answering(status, body) as url:
        client = ManagerClient(Addresses([url]))
        with pytest.raises(UnknownWorker):
            await client.heartbeat("w1", beat())
        await client.close()


@pytest.mark.parametrize("body", [b"nothing here", b"[" * 200_000])
async def test_a_registration_that_finds_nothing_is_no_manager(body: bytes) -> None:
    """[H48] 404 to a registration is a wrong URL, said as such, whatever nested page comes with it."""
    async with answering(404, body) as url:
        client = ManagerClient(Addresses([url]))
        with pytest.raises(ManagerUnavailable, match="is it the right URL"):
            await client.register(REGISTRATION)
        await client.close()


async def test_the_title_of_a_proxy_s_page_is_said() -> None:
    """It tells a client certificate that is missing from a wrong URL."""
    page = b"<html>\r\n<head><title>400 No required SSL certificate was sent</title></head>\r\n<body>...</body></html>"
    async with answering(400, page) as url:
        client = ManagerClient(Addresses([url]))
        with pytest.raises(ManagerUnavailable, match=r"answers 400 \(400 No required SSL certificate was sent\)"):
            await client.register(REGISTRATION)
        await client.close()


async def test_a_wrong_token_error_names_the_setting() -> None:
    """401: which URL refused, and which setting to correct."""
    async with answering(401, AuthenticationFailed("wrong").body()) as url:
        client = ManagerClient(Addresses([url], {JOIN_TOKEN_HEADER: "not the one"}))
        with pytest.raises(AuthenticationFailed, match=f"{url}.*INFERQ_JOIN_TOKEN"):
            await client.register(REGISTRATION)
        await client.close()


async def test_a_goodbye_goes_only_to_a_manager_that_listens() -> None:
    """A worker that ends while Managers change tells the one that acts; with none, it says that it could not."""
    async with answering(503, b"{}") as standing_by, answering(204) as acting:
        client = ManagerClient(Addresses([standing_by, acting]))
        await client.deregister("w1", SESSION_ID)
        assert client.url == acting
        await client.close()
        nobody = ManagerClient(Addresses([standing_by, standing_by]))
        with pytest.raises(ManagerUnavailable):
            await nobody.deregister("w1", SESSION_ID)
        await nobody.close()


async def test_a_url_that_hangs_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lets a call run out of time is not visited at each turn, unless there is nobody else."""
    monkeypatch.setattr(fabric, "HEARTBEAT_TIMEOUT_S", 0.05)
    async with answering(200, hang=True) as frozen, answering(503, b"{}") as standing_by:
        client = ManagerClient(Addresses([frozen, standing_by]))
        visited = []
        for _ in range(4):
            visited.append(client.url)
            with pytest.raises(ManagerUnavailable):
                await client.heartbeat("w1", beat())
            client.turn()
        await client.close()
    assert visited == [frozen, standing_by, standing_by, standing_by]


async def test_urls_that_all_hang_are_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody better, the one that hung first is tried first."""
    monkeypatch.setattr(fabric, "HEARTBEAT_TIMEOUT_S", 0.05)
    async with answering(200, hang=True) as one, answering(200, hang=True) as two:
        client = ManagerClient(Addresses([one, two]))
        visited = []
        for _ in range(4):
            visited.append(client.url)
            with pytest.raises(ManagerUnavailable):
                await client.heartbeat("w1", beat())
            client.turn()
        await client.close()
    assert visited == [one, two, one, two]


async def test_an_answer_that_comes_in_pieces_is_read_whole() -> None:
    """A long registration answer arrives in several segments; it is one message all the same."""
    answer = RegistrationAnswer(
        broker_url="redis://host",
        shards=1,
        lease_ms=15_000,
        heartbeat_interval_ms=2_000,
        assignment=Assignment(
            term=1, version=1, pools=[PoolAssignment(pool=Pool(f"{i:0>200}"), shard=0) for i in range(400)]
        ),
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
    client = ManagerClient(Addresses([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"]))
    try:
        assert await client.register(REGISTRATION) == answer
    finally:
        await client.close()
        server.close()
