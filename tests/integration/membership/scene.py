"""What the tests of membership play with: an engine that streams until told to end, a Manager that says what it is told
to, and a fleet with two Managers and a Router to each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from queue_schemas import FABRIC_PREFIX
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.sse import read_data
from tests.support.waiting import eventually

WAIT_LIMIT_S = 25.0
"""Limit on what takes a second where nothing else runs."""


class OpenEndedEngine:
    """Streams numbered tokens from each call on until :meth:`finish`. ``calls`` counts starts, ``open`` what runs."""

    def __init__(self) -> None:
        self.url = ""
        self.calls = 0
        self.open = 0
        self._finished = asyncio.Event()

    def finish(self) -> None:
        """Let every stream end after its next token."""
        self._finished.set()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.calls += 1
        self.open += 1
        try:
            return await self._stream(request)
        finally:
            self.open -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        number = 0
        while not self._finished.is_set():
            await answer.write(_event({"content": f"{number} "}))
            number += 1
            await asyncio.sleep(0.05)
        await answer.write(_event({"content": f"of {number}"}, "stop") + b"data: [DONE]\n\n")
        return answer


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "open", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "open", "object": "model"}]})


async def _well(_request: web.Request) -> web.Response:
    return web.Response()


@asynccontextmanager
async def open_ended_engine() -> AsyncIterator[OpenEndedEngine]:
    """The engine, listening, of model ``open``."""
    engine = OpenEndedEngine()
    app = web.Application()
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _well)
    app.router.add_post("/v1/chat/completions", engine.chat)
    async with _listening(app) as engine.url:
        yield engine


class ForeignManager:
    """Answers workers as the test says: registrations with ``assignment``, heartbeats with the next of
    ``heartbeat_answers``, then with ``assignment``. ``registered`` are the sessions that came, ``heartbeats`` counts
    theirs."""

    def __init__(self, broker_url: str) -> None:
        self.url = ""
        self.broker_url = broker_url
        self.assignment: dict[str, Any] = {}
        self.heartbeat_answers: list[tuple[int, dict[str, Any]]] = []
        self.registered: list[str] = []
        self.heartbeats = 0

    async def register(self, request: web.Request) -> web.Response:
        self.registered.append((await request.json())["session_id"])
        fixed = {"broker_url": self.broker_url, "shards": 1, "lease_ms": 15_000, "heartbeat_interval_ms": 100}
        return web.json_response(fixed | {"assignment": self.assignment})

    async def heartbeat(self, _request: web.Request) -> web.Response:
        self.heartbeats += 1
        status, body = (
            self.heartbeat_answers.pop(0) if self.heartbeat_answers else (200, {"assignment": self.assignment})
        )
        return web.json_response(body, status=status)


@asynccontextmanager
async def foreign_manager(broker_url: str) -> AsyncIterator[ForeignManager]:
    """The Manager, listening."""
    manager = ForeignManager(broker_url)
    app = web.Application()
    app.router.add_post(f"{FABRIC_PREFIX}/workers", manager.register)
    app.router.add_post(f"{FABRIC_PREFIX}/workers/{{worker_id}}/heartbeat", manager.heartbeat)
    async with _listening(app) as manager.url:
        yield manager


@asynccontextmanager
async def _listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class LongStream:
    """One streamed chat with the open-ended engine, on its way."""

    def __init__(self, fleet: Fleet, router: Role) -> None:
        self.pieces: list[str] = []
        self._task = asyncio.create_task(self._read(fleet, router))

    async def begun(self) -> Self:
        """Wait for its first token."""

        def has_begun() -> bool:
            assert not self._task.done(), self._task
            return bool(self.pieces)

        await eventually(has_begun, "the stream begins", limit_s=WAIT_LIMIT_S)
        return self

    async def goes_on(self) -> None:
        """Wait until more has come than there is now."""
        seen = len(self.pieces)

        def more() -> bool:
            assert not self._task.done(), self._task
            return len(self.pieces) > seen + 3

        await eventually(more, "the stream goes on", limit_s=WAIT_LIMIT_S)

    async def whole(self) -> None:
        """Its end, with every token once and in order."""
        async with asyncio.timeout(WAIT_LIMIT_S):
            await self._task
        tokens = len(self.pieces) - 1
        assert "".join(self.pieces) == "".join(f"{number} " for number in range(tokens)) + f"of {tokens}"

    async def leave(self) -> None:
        """Disconnect."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, fleet: Fleet, router: Role) -> None:
        async def served() -> bool:
            return (await router.get("/v1/models/open"))[0] == 200

        await eventually(served, f"{router.name} knows the model", limit_s=WAIT_LIMIT_S)
        body = {"model": "open", "stream": True, "messages": [{"role": "user", "content": "go on"}]}
        async with fleet.session.post(f"{router.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for data in read_data(answer):
                if data != "[DONE]":
                    chunk = json.loads(data)
                    assert "error" not in chunk, chunk
                    self.pieces += [choice["delta"]["content"] for choice in chunk["choices"]]


class TwoManagers(Fleet):
    """Two Managers on one Redis, a Router to each, and workers that know both Routers."""

    def __init__(
        self,
        folder: Path,
        server: Server,
        *,
        manager: Mapping[str, object] | None = None,
        second: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(folder, server, manager=manager)
        self._second = dict(second or {})

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.managers = [self.manager, self.add("manager-2", "manager.service", self._manager_flags | self._second)]
        self.routers = [self.router, self.another_router("router-2", manager_url=self.managers[1].url)]
        return self

    async def up(self, workers: int = 1, **flags: object) -> Self:
        """Start everything; the first Manager acts, the second stands by."""
        self.managers[0].process.start()
        others = [*self.routers, *(self.member(f"worker-{number + 1}", **flags) for number in range(workers))]
        for role in others:
            role.process.start()
        await self.managers[0].ready()
        self.managers[1].process.start()
        await asyncio.gather(*(role.ready() for role in others))
        await eventually(lambda: self.stands_by(1), "the second Manager stands by", limit_s=WAIT_LIMIT_S)
        return self

    def member(self, name: str, **flags: object) -> Role:
        """A worker, not started yet, that knows both Routers."""
        return self.worker(name, manager_url=",".join(router.url for router in self.routers), **flags)

    async def acts(self, number: int) -> bool:
        return (await self.managers[number].get("/readyz"))[0] == 200

    async def stands_by(self, number: int) -> bool:
        status, body = await self.managers[number].get("/readyz")
        return status == 503 and b"standing by" in body

    async def term(self, number: int) -> int:
        """The term in which that Manager acts."""
        term: int = (await self.managers[number].page(f"{FABRIC_PREFIX}/workers"))["term"]
        return term

    async def settled_at(self, number: int) -> None:
        """Wait until that Manager acts and assigns every worker in its term, whichever Router the worker asks."""
        await eventually(lambda: self.acts(number), f"{self.managers[number].name} acts", limit_s=WAIT_LIMIT_S)
        term = await self.term(number)

        async def there() -> bool:
            pages = [await worker.page("/status") for worker in self.workers]
            return all(page["ready"] and page["assignment"][0] == term for page in pages)

        await eventually(there, f"{self.managers[number].name} has all workers", limit_s=WAIT_LIMIT_S)
