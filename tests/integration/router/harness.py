"""A Router on a real port over a real Valkey, and a worker without an engine that tests let speak."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from broker import Broker, BrokerSettings
from queue_schemas import END, HEAD, Frame, Lease, Outcome, Settled
from router import RouterApp, RouterSettings, build_router
from telemetry.environment import free_port
from telemetry.http.server import bind_socket
from tests.support.queue import MODEL, Puller
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue, router

SSE = "text/event-stream; charset=utf-8"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
PATH = "/v1/chat/completions"


@dataclass
class RunningRouter:
    app: RouterApp
    port: int
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, fields: Any, **options: Any) -> Any:
        return self.session.post(self.url + PATH, json=fields, **options)

    async def plain(self, fields: Any = CHAT, **options: Any) -> tuple[int, bytes]:
        """One request, to its end."""
        async with self.post(fields, **options) as answer:
            return answer.status, await answer.read()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.json()


@asynccontextmanager
async def running_router(redis_url: str, *, ready: bool = True, **settings: Any) -> AsyncIterator[RunningRouter]:
    """A Router with short intervals, its model declared."""
    fields = {
        "pools": [MODEL],
        "sweep_interval_ms": 20,
        "directory_interval_ms": 100,
        "shutdown_timeout_ms": 200,
    } | settings
    app = build_router(RouterSettings(port=free_port(), **fields), BrokerSettings(redis_url=redis_url))
    port = app.services.settings.port
    stop = asyncio.Event()
    async with app.running(), asyncio.TaskGroup() as tasks:
        tasks.create_task(app.listen(bind_socket("127.0.0.1", port), stop=stop, shutdown_timeout_s=1))
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
                router = RunningRouter(app, port, session)

                async def listens() -> bool:
                    try:
                        return (await router.get("/healthz"))[0] == 200
                    except aiohttp.ClientError:
                        return False

                await eventually(listens, "the router listens")
                if ready:
                    await eventually(lambda: not app.services.not_ready_reasons(), "the router is ready")
                yield router
        finally:
            stop.set()


@asynccontextmanager
async def fake_router(queue: FakeQueue, **settings: Any) -> AsyncIterator[int]:
    """The port of a Router that listens, over a queue in memory."""
    stop = asyncio.Event()
    async with router(queue, **settings) as app:
        with bind_socket("127.0.0.1", 0) as listener:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(app.listen(listener, stop=stop, shutdown_timeout_s=1))
                try:
                    yield listener.getsockname()[1]
                finally:
                    stop.set()


@dataclass
class Speaker:
    """A worker whose engine is the test."""

    puller: Puller
    _seq: dict[str, int] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def join(cls, redis_url: str) -> AsyncIterator[Self]:
        broker = await Broker.connect(BrokerSettings(redis_url=redis_url, retry_limit_ms=10_000))
        try:
            yield cls(await Puller(broker).join())
        finally:
            await broker.close()

    @property
    def broker(self) -> Broker:
        return self.puller.broker

    async def lease(self) -> Lease:
        """The next job."""

        async def claimed() -> list[Lease]:
            return await self.puller.claim(1)

        return (await eventually(claimed, "a job is claimed"))[0]

    def frame(self, lease: Lease, data: bytes, *, end: bool = False, kind: str = SSE) -> bytes:
        seq = self._seq.get(lease.attempt_id, 0)
        self._seq[lease.attempt_id] = seq + 1
        flags = (HEAD if seq == 0 else 0) | (END if end else 0)
        head = (200, kind) if flags & HEAD else (0, "")
        return Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, flags, data, *head).pack()

    async def say(self, lease: Lease, data: bytes) -> None:
        """A piece of a streamed answer."""
        await self.broker.attempts.publish(0, {lease.job.reply_to: self.frame(lease, data)})

    async def end(self, lease: Lease, data: bytes = b"", kind: str = SSE) -> Settled:
        """The last piece."""
        return await self.broker.attempts.settle(lease, Outcome.DONE, self.frame(lease, data, end=True, kind=kind))

    async def answer(self, lease: Lease, data: bytes = b'{"ok":1}') -> Settled:
        """A whole plain answer."""
        return await self.end(lease, data, "application/json")
