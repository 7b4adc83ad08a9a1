"""What rules for Routers have at hand: scripted workers of a model of their own, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from queue_schemas import JOIN_TOKEN_HEADER, CannotStart

from .scorecard import Broken
from .scripted_worker import ScriptedWorker

READY_LIMIT_S = 20.0
ANSWER_LIMIT_S = 60.0


class RouterKit:
    """The Router at ``url``, with what its callers show: a worker's key (or the join token) and an API key."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, *, key: str, join_token: str, api_key: str, name: str, model: str
    ) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.name = name
        self.model = model
        self.guarded = bool(key or join_token)
        self.http = http
        self.worker_headers = {"authorization": f"Bearer {key}"} if key else {JOIN_TOKEN_HEADER: join_token}
        self._client_headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._workers: list[ScriptedWorker] = []

    def another(self, name: str = "", *, headers: Mapping[str, str] | None = None) -> ScriptedWorker:
        """A worker that has not joined."""
        made = ScriptedWorker(self.http, self.url, headers or self.worker_headers, name or self.name, self.model)
        self._workers.append(made)
        return made

    async def worker(self) -> ScriptedWorker:
        """A worker that has joined and for whose model requests are taken."""
        worker = self.another()
        reply = await worker.join()
        if reply.status != 200:
            raise Broken(f"a join is answered {reply.status} {reply.code}: {str(reply.message)[:300]}")
        until = asyncio.get_running_loop().time() + READY_LIMIT_S
        while True:
            async with self.http.get(f"{self.url}/v1/models/{self.model}", headers=self._client_headers) as answer:
                if answer.status == 200 and "hint" not in await answer.json():
                    return worker
            if asyncio.get_running_loop().time() > until:
                raise Broken(f"{READY_LIMIT_S:.0f} s after a worker joined, its model is not listed as served")
            await worker.heartbeat()
            await asyncio.sleep(0.1)

    def ask(self, content: str, *, stream: bool = False, **fields: Any) -> asyncio.Task[tuple[int, bytes]]:
        """Send a chat as a client; status and body of its answer."""
        body = {"model": self.model, "stream": stream, "messages": [{"role": "user", "content": content}], **fields}
        return asyncio.ensure_future(self._ask(orjson.dumps(body)))

    async def calm_down(self) -> None:
        """Let all workers of the rule leave."""
        workers, self._workers = self._workers, []
        for worker in workers:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await worker.leave()

    async def _ask(self, body: bytes) -> tuple[int, bytes]:
        headers = {**self._client_headers, "content-type": "application/json"}
        async with self.http.post(f"{self.url}/v1/chat/completions", data=body, headers=headers) as answer:
            return answer.status, await answer.read()


@asynccontextmanager
async def router_kit(
    url: str, *, key: str, join_token: str, api_key: str, name: str = "", model: str = ""
) -> AsyncIterator[RouterKit]:
    """The kit. Raises ``CannotStart`` if nobody answers at ``url``."""
    mark = secrets.token_hex(4)
    limits = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as http:
        try:
            async with http.get(f"{url.rstrip('/')}/healthz") as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise CannotStart(f"there is no Router at {url}: {error}") from error
        kit = RouterKit(
            http,
            url,
            key=key,
            join_token=join_token,
            api_key=api_key,
            name=name or f"conformance-{mark}",
            model=model or f"conformance-{mark}",
        )
        try:
            yield kit
        finally:
            await kit.calm_down()
