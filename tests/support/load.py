"""Load on a fleet: mixed requests from concurrent clients, each answer checked against its own prompt.

The simulated engines run in echo mode: a chat answers the last user message, a completion its prompt; a vector is drawn
by model and text. So an answer that was mixed up, cut or doubled shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp

from worker.engines.simulated.api.answers import embedding

from .sse import read_data
from .waiting import eventually

DIMENSIONS = 16
KINDS = ("chat", "chat stream", "completion", "completion stream", "embedding")


@dataclass
class Load:
    """``total`` requests by ``clients`` at once; ``done`` counts answers, ``wrong`` says what was wrong with others."""

    url: str
    total: int
    clients: int
    models: Sequence[str] = ("sim",)
    keys: Sequence[str] = ("",)
    words: int = 12
    limit_s: float = 120.0
    done: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Send everything; returns when all are answered."""
        numbers = iter(range(self.total))
        timeout = aiohttp.ClientTimeout(total=self.limit_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            for _, key in zip(range(self.clients), cycle(self.keys), strict=False):
                group.create_task(self._client(session, numbers, key))

    async def reached(self, share: float) -> None:
        """Wait until this share of the requests has been answered."""
        await eventually(
            lambda: self.done + len(self.wrong) >= share * self.total,
            f"{share:.0%} of the requests are answered",
            limit_s=self.limit_s,
        )

    async def _client(self, session: aiohttp.ClientSession, numbers: Any, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        for number in numbers:
            kind = KINDS[number % len(KINDS)]
            try:
                problem = await self._ask(session, headers, number, kind)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self.wrong.append(f"request {number} ({kind}): {problem}")
            else:
                self.done += 1

    async def _ask(self, session: aiohttp.ClientSession, headers: dict[str, str], number: int, kind: str) -> str:
        model = self.models[number // len(KINDS) % len(self.models)]
        text = f"number {number} " + " ".join(f"w{number}-{word}" for word in range(self.words))
        path, body = _request(kind, model, text)
        async with session.post(f"{self.url}{path}", json=body, headers=headers) as answer:
            if answer.status != 200:
                return f"status {answer.status}: {(await answer.text())[:300]}"
            if kind.endswith("stream"):
                return await _check_stream(answer, kind, text)
            return _CHECKS[kind](await answer.json(), model, text)


def _request(kind: str, model: str, text: str) -> tuple[str, dict[str, Any]]:
    stream = {"stream": True} if kind.endswith("stream") else {}
    if kind.startswith("chat"):
        return "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": text}], **stream}
    if kind.startswith("completion"):
        return "/v1/completions", {"model": model, "prompt": text, "max_tokens": 500, **stream}
    return "/v1/embeddings", {"model": model, "input": text}


def _same(got: str, wanted: str) -> str:
    return "" if got == wanted else f"got {got[:200]!r}, wanted {wanted[:200]!r}"


def _embedding(answer: Any, model: str, text: str) -> str:
    wanted = embedding(text, model, 0, DIMENSIONS)
    got = answer["data"][0]["embedding"]
    close = len(got) == len(wanted) and all(abs(a - b) < 1e-6 for a, b in zip(got, wanted, strict=True))
    return "" if close else f"another vector: {got[:3]} instead of {wanted[:3]}"


_CHECKS: dict[str, Callable[[Any, str, str], str]] = {
    "chat": lambda answer, model, text: _same(answer["choices"][0]["message"]["content"], text),
    "completion": lambda answer, model, text: _same(answer["choices"][0]["text"], text),
    "embedding": _embedding,
}


async def _check_stream(answer: aiohttp.ClientResponse, kind: str, text: str) -> str:
    """One gapless text under one id, a finish reason, and the end mark."""
    pieces: list[str] = []
    ids: set[str] = set()
    finished = ended = 0
    async for data in read_data(answer):
        if data == "[DONE]":
            ended += 1
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return f"error event {chunk['error']}"
        ids.add(chunk["id"])
        for choice in chunk["choices"]:
            pieces.append((choice["delta"].get("content") or "") if kind.startswith("chat") else choice["text"])
            finished += choice.get("finish_reason") is not None
    if (ended, finished, len(ids)) != (1, 1, 1):
        return f"{ended} end marks, {finished} finish reasons, {len(ids)} ids"
    return _same("".join(pieces), text)
