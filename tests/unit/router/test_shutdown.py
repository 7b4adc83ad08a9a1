"""A Router that leaves its shared port: everybody is told, nobody is refused, the last one is answered whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from queue_schemas import CannotStart
from router import RouterSettings, build_router, ray_serve
from router.http.shared_listener import SharedListener
from router.ray_serve import serve_through
from telemetry.environment import free_port
from tests.support.waiting import eventually
from tests.unit.router.fakes import LIMIT_S, FakeQueue

CHAT = {"model": "m", "messages": []}
STREAM = CHAT | {"stream": True}


@dataclass
class Replica:
    """A Router that serves through a shared listener over a queue in memory."""

    url: str
    queue: FakeQueue
    life: asyncio.Task[None]
    leave: asyncio.Event
    client: aiohttp.ClientSession = field(init=False)

    async def ready(self) -> tuple[int, str]:
        async with self.client.get(f"{self.url}/readyz") as answer:
            return answer.status, answer.headers.get("connection", "")


@asynccontextmanager
async def replica(folder: Path, port: int = 0, **settings: int) -> AsyncIterator[Replica]:
    """One, ready; its client keeps one connection open at most."""
    queue = FakeQueue("m")

    async def open_queue() -> FakeQueue:
        return queue

    port = port or free_port()
    given = {
        "lame_duck_ms": 400,
        "shutdown_timeout_ms": 3_000,
        "directory_interval_ms": 20,
        "sweep_interval_ms": 10,
    } | settings
    app = build_router(RouterSettings(port=port, **given), open_queue=open_queue)  # type: ignore[arg-type]
    listening, leave = asyncio.Event(), asyncio.Event()
    life = asyncio.create_task(
        serve_through(
            SharedListener("f", "127.0.0.1", port, folder=folder / "listeners"), app, listening=listening, leave=leave
        )
    )
    found = Replica(f"http://127.0.0.1:{port}", queue, life, leave)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1), timeout=aiohttp.ClientTimeout(total=LIMIT_S)
    ) as found.client:

        async def ready() -> bool:
            return listening.is_set() and (await found.ready())[0] == 200

        await eventually(ready, "the replica is ready")
        yield found
        leave.set()
        async with asyncio.timeout(2 * LIMIT_S):
            await life


async def test_open_connections_are_served_and_told_to_close(tmp_path: Path) -> None:
    """While it leaves, /readyz says no and every answer on an open connection asks for another connection."""
    async with replica(tmp_path) as one:
        async with one.client.get(f"{one.url}/v1/models") as before:
            assert before.headers.get("connection") != "close"
        one.leave.set()
        async with one.client.get(f"{one.url}/readyz") as answer:
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert (await answer.json())["reasons"] == ["the router is shutting down"]


async def test_no_new_connection_is_accepted(tmp_path: Path) -> None:
    """New connections are for the others that share the listener; here there is none, so they are refused."""
    async with replica(tmp_path) as one:
        one.leave.set()
        await asyncio.sleep(0)
        async with one.client.get(f"{one.url}/healthz") as answer:
            assert answer.status == 200  # on the open connection, which ends with it
        with pytest.raises(aiohttp.ClientConnectorError):
            await one.client.get(f"{one.url}/healthz")


async def test_new_connections_go_to_the_other_router(tmp_path: Path) -> None:
    """Two share one listener: while one leaves, every new connection meets the other."""
    async with replica(tmp_path) as one, replica(tmp_path, port=int(one.url.rpartition(":")[2])) as other:
        one.leave.set()
        async with asyncio.timeout(LIMIT_S):
            await one.life
        for _ in range(5):
            async with aiohttp.request("GET", f"{other.url}/readyz") as answer:
                assert answer.status == 200


async def test_a_request_on_an_open_connection_is_answered_while_it_leaves(tmp_path: Path) -> None:
    """Inference, too: the client that had not heard of it gets its answer, and the word to go."""
    async with replica(tmp_path) as one:
        one.leave.set()
        asked = asyncio.create_task(one.client.post(f"{one.url}/v1/chat/completions", json=CHAT))
        one.queue.answer(await one.queue.job(), b'{"ok": true}')
        async with await asked as answer:
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await answer.json() == {"ok": True}


async def test_a_stream_that_began_earlier_keeps_its_connection_for_one_more_request(tmp_path: Path) -> None:
    """A stream began before, ends long after: its connection is used again at once, and that request is served."""
    async with replica(tmp_path, lame_duck_ms=300, shutdown_timeout_ms=5_000) as one:
        asked = asyncio.create_task(one.client.post(f"{one.url}/v1/chat/completions", json=STREAM))
        job = await one.queue.job()
        one.queue.stream(job, b"data: 1\n\n", end=False)
        async with await asked as stream:
            assert stream.headers.get("connection") != "close"
            one.leave.set()
            assert await stream.content.readany() == b"data: 1\n\n"
            with pytest.raises(TimeoutError):  # far longer than the lame duck's time
                await asyncio.wait_for(asyncio.shield(one.life), 1.0)
            one.queue.stream(job, b"data: [DONE]\n\n", first=1)
            assert await stream.read() == b"data: [DONE]\n\n"
        again = asyncio.create_task(one.client.post(f"{one.url}/v1/chat/completions", json=CHAT))
        one.queue.answer(await one.queue.job(), b"{}")
        async with await again as answer:
            assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_an_endless_stream_does_not_block_shutdown(tmp_path: Path) -> None:
    """The limit of a drain bounds it: then the stream ends with an error event, and its job is cancelled."""
    async with replica(tmp_path, lame_duck_ms=100, shutdown_timeout_ms=300) as one:
        asked = asyncio.create_task(one.client.post(f"{one.url}/v1/chat/completions", json=STREAM))
        job = await one.queue.job()
        one.queue.stream(job, b"data: 1\n\n", end=False)
        async with await asked as stream:
            begun = asyncio.get_running_loop().time()
            one.leave.set()
            body = await stream.read()
        assert b"shutting_down" in body
        assert asyncio.get_running_loop().time() - begun >= 0.4
        assert (await one.queue.cancellation())[0] == job.id


async def test_without_a_lame_duck_it_ends_as_soon_as_it_is_idle(tmp_path: Path) -> None:
    """The default of a process of its own: nobody is waited for who does not ask for anything."""
    async with replica(tmp_path, lame_duck_ms=0) as one:
        one.leave.set()
        async with asyncio.timeout(LIMIT_S):
            await one.life


async def test_a_router_that_is_not_ready_leaves_connections_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the socket, and accepts nothing before it is ready; only when that takes too long it says why not."""
    monkeypatch.setattr(ray_serve, "_FIRST_READY_S", 1.0)
    async with replica(tmp_path) as one:
        port = int(one.url.rpartition(":")[2])
        app = build_router(RouterSettings(port=port), open_queue=asyncio.Event().wait)  # type: ignore[arg-type]
        listening, leave = asyncio.Event(), asyncio.Event()
        shared = SharedListener("f", "127.0.0.1", port, folder=tmp_path / "listeners")
        other = asyncio.create_task(serve_through(shared, app, listening=listening, leave=leave))
        await eventually(lambda: hasattr(shared, "listener"), "the other shares the socket")
        asked = 0
        while not listening.is_set():
            async with aiohttp.request("GET", f"{one.url}/readyz") as answer:
                asked += listening.is_set() or answer.status == 200
                assert listening.is_set() or answer.status == 200
        assert asked > 5

        async def told() -> bool:
            async with aiohttp.request("GET", f"{one.url}/readyz") as answer:
                return answer.status == 503 and "not connected to the queue yet" in await answer.text()

        await eventually(told, "the other says why it is not ready")
        leave.set()
        async with asyncio.timeout(LIMIT_S):
            await other


async def test_a_taken_address_is_reported(tmp_path: Path) -> None:
    """Who cannot listen does not look like a replica that serves."""
    async with replica(tmp_path) as one:
        port = int(one.url.rpartition(":")[2])
        listening = asyncio.Event()
        app = build_router(RouterSettings(port=port), open_queue=asyncio.Event().wait)  # type: ignore[arg-type]
        with pytest.raises(CannotStart, match="is taken by another process"):
            shared = SharedListener("another", "127.0.0.1", port, folder=tmp_path / "listeners")
            await serve_through(shared, app, listening=listening, leave=asyncio.Event())
        assert not listening.is_set()
