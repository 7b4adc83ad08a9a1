"""The load: clients of several kinds that write down all they see, and judge nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import aiohttp

from tests.support.load import events_of
from tests.support.traffic import cells_of

from .history import History, Request

MODEL = "sim"
LIMIT_S = 45.0
"""Longer than anything may take: a request that reaches it is lost."""
MOST_COMPLETION_CELLS = 60
"""Cells repeat after 62 places; an echoed prompt that repeats itself looks like one that is half answered."""
TENANTS = ("acme", "globex", "initech")
KINDS = (
    "chat stream", "chat stream", "chat stream", "completion stream", "completion stream", "chat", "chat", "completion",
    "embedding", "leaver", "slow reader stream", "deadline",
)  # fmt: skip
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"model": "sim"',
    b'{"model": 7}',
    b'{"model": "sim", "stream": "yes"}',
    b"[" * 5_000,
    b'{"model": "sim", "messages": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    b"\xff\xfe\x00",
    b'{"model": "no-such-model", "messages": []}',
    b'{"model": "sim", "messages": "' + b"x" * (5 << 20) + b'"}',
)


class Clients:
    """``count`` clients, each with one request at a time on a connection of its own, against ``urls``."""

    def __init__(self, urls: Sequence[str], history: History, *, seed: int, count: int = 20) -> None:
        self._urls = urls
        self._history = history
        self._seed = seed
        self._count = count
        self._numbers = itertools.count()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._run(number), name="client") for number in range(self._count)]

    async def stop(self) -> None:
        """Let each request that is under way end, or reach its limit."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    def abandon(self) -> None:
        """End at once; nothing more is written down."""
        for task in self._tasks:
            task.cancel()

    async def burst(self, kind: str, count: int) -> None:
        """``count`` requests of one kind at once."""
        rng = random.Random(next(self._numbers))
        async with self._session() as session:
            await asyncio.gather(*(self._ask(session, kind, rng) for _ in range(count)))

    async def _run(self, number: int) -> None:
        rng = random.Random(f"{self._seed}:{number}")
        while not self._stopping.is_set():
            # Anew for each: a connection that a killed Router held tells nothing of the next request.
            async with self._session() as session:
                request = await self._ask(session, rng.choice(KINDS), rng)
            if request.end in ("cut", "error"):
                await asyncio.sleep(0.2)

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=LIMIT_S))

    async def _ask(self, session: aiohttp.ClientSession, kind: str, rng: random.Random) -> Request:
        number = next(self._numbers)
        cells = rng.choice((8, 20, 60, 120)) if "stream" in kind or kind == "leaver" else rng.choice((4, 12, 30))
        if kind.startswith("completion"):
            cells = min(cells, MOST_COMPLETION_CELLS)
        router = rng.randrange(len(self._urls))
        request = Request(number, kind, router, cells, self._history.now_s)
        path, body = _body(kind, number, cells, rng)
        headers = {
            "authorization": f"Bearer {TENANTS[number % len(TENANTS)]}",
            "content-type": "application/json",
            "x-request-id": f"chaos-{number}",
        }
        if kind == "deadline":
            headers["x-inferq-deadline-ms"] = str(rng.choice((1, 50, 300)))
        leave_after = rng.randrange(cells) if kind == "leaver" else None
        patience_s = rng.uniform(0.0, 0.3) if kind == "hurried" else None
        pause_s = 0.02 if kind == "slow reader stream" else 0.0
        try:
            async with (
                asyncio.timeout(patience_s),
                session.post(self._urls[router] + path, data=body, headers=headers) as answer,
            ):
                request.status = answer.status
                request.request_id = answer.headers.get("x-request-id", "")
                await _read(answer, request, leave_after, pause_s)
        except TimeoutError:
            request.end = "left" if kind == "hurried" else "silent"
        except (aiohttp.ClientError, OSError) as error:
            request.end, request.message = "cut", f"{type(error).__name__}: {error}"
        request.ended_s = self._history.now_s
        self._history.add_request(request)
        return request


def _body(kind: str, number: int, cells: int, rng: random.Random) -> tuple[str, bytes]:
    if kind == "malformed":
        return "/v1/chat/completions", rng.choice(MALFORMED)
    text = cells_of(number, cells)
    if kind == "embedding":
        return "/v1/embeddings", json.dumps({"model": MODEL, "input": text}).encode()
    fields: dict[str, Any] = {"model": MODEL}
    if "stream" in kind or kind in ("leaver", "hurried"):
        fields |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.7}}
    if kind.startswith("completion"):
        return "/v1/completions", json.dumps(fields | {"prompt": text, "max_tokens": cells}).encode()
    fields |= {"messages": [{"role": "user", "content": text}]}
    return "/v1/chat/completions", json.dumps(fields).encode()


async def _read(answer: aiohttp.ClientResponse, request: Request, leave_after: int | None, pause_s: float) -> None:
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        _read_plain(json.loads(await answer.read()), request)
        return
    async for data in events_of(answer):
        if data == "[DONE]":
            request.done += 1
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            request.end = "error"
            request.code, request.message = chunk["error"]["code"], chunk["error"]["message"]
            return
        request.ids.append(chunk["id"])
        if chunk.get("usage"):
            request.usage, request.usages = _figures(chunk["usage"]), request.usages + 1
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            request.text += delta.get("content") or choice.get("text") or ""
            request.roles += "role" in delta
            request.finishes += [choice["finish_reason"]] if choice.get("finish_reason") else []
        if leave_after is not None and len(request.text) > 4 * leave_after:
            request.end = "left"
            return
        if pause_s:
            await asyncio.sleep(pause_s)
    request.ids = sorted(set(request.ids))
    request.end = "answered"


def _read_plain(body: Any, request: Request) -> None:
    if "error" in body:
        request.end = "error"
        request.code, request.message = str(body["error"]["code"]), body["error"]["message"]
        return
    request.end = "answered"
    if body["object"] == "list":
        return
    (choice,) = body["choices"]
    request.text = choice["message"]["content"] if "message" in choice else choice["text"]
    request.ids = [body["id"]]
    request.usage = _figures(body["usage"])


def _figures(usage: dict[str, Any]) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
