"""A Router in memory behind a real socket, for clients that speak HTTP: the SDKs, unmodified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai

from router import RouterApp
from telemetry.http.server import bind_socket
from tests.unit.router.fakes import FakeQueue, router


@dataclass(frozen=True)
class Served:
    """One Router. The clients repeat nothing by themselves unless they are told to."""

    app: RouterApp
    url: str

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **({"api_key": "key", "max_retries": 0} | options))

    def openai_sync(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "key", "max_retries": 0} | options))

    def anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url, **({"api_key": "key", "max_retries": 0} | options))

    def anthropic_sync(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, **({"api_key": "key", "max_retries": 0} | options))


@contextlib.asynccontextmanager
async def served(queue: FakeQueue, **settings: Any) -> AsyncIterator[Served]:
    """A Router over ``queue`` on a free port of the loopback."""
    async with router(queue, **settings) as app:
        listener = bind_socket("127.0.0.1", 0)
        port = listener.getsockname()[1]
        stop = asyncio.Event()
        serving = asyncio.create_task(app.listen(listener, stop=stop, shutdown_timeout_s=1.0))
        try:
            yield Served(app, f"http://127.0.0.1:{port}")
        finally:
            stop.set()
            await serving
