"""The load: clients of several kinds that write down all they see, and judge nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.support.load import events_of

from .asks import KINDS, Ask, make_ask, request_id
from .history import Entry, History, Request

LIMIT_S = 45.0
"""Longer than anything may take: a request that reaches it is lost."""
AGAIN_S = 0.2
REUSE_EVERY = 5
"""One in so many requests with a key is followed by another body under it."""
_ASK_AGAIN = ("broker_unavailable", "broker_full", "shutting_down")
KEPT_S = 2.0
"""How long a client keeps an idle connection: the Router closes none that soon."""
_RAW: tuple[bytes, ...] = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + b"x-y: " + b"z" * 100_000 + b"\r\n\r\n",
)


class Clients:
    """``count`` clients, each with one request at a time, against ``urls``; every other one keeps its connections."""

    def __init__(self, urls: Sequence[str], history: History, *, seed: int, count: int = 18) -> None:
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

    async def burst(self, kind: str, count: int, at_once: int) -> None:
        """``count`` requests of one kind, ``at_once`` of them at any time."""
        rng = random.Random(next(self._numbers))
        left = iter(range(count))

        async def one_after_the_other(session: aiohttp.ClientSession) -> None:
            for _ in left:
                await self._ask(session, kind, rng)

        async with _session(keep=False) as session:
            await asyncio.gather(*(one_after_the_other(session) for _ in range(at_once)))

    async def loris(self, count: int, lasts_s: float) -> None:
        """``count`` connections that send a request byte by byte and never end it, or something that is none."""
        await asyncio.gather(*(self._creep(number, lasts_s) for number in range(count)))

    async def _creep(self, number: int, lasts_s: float) -> None:
        url = urlsplit(self._urls[number % len(self._urls)])
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(url.hostname, url.port)
            try:
                if number % 3 == 0:
                    writer.write(_RAW[number // 3 % len(_RAW)])
                else:
                    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
                    writer.write(head + (b"" if number % 3 == 1 else b"authorization: Bearer acme\r\n\r\n{"))
                for _ in range(int(lasts_s / 0.25)):
                    await asyncio.sleep(0.25)
                    if writer.is_closing():
                        break
                    writer.write(b" ")
            finally:
                writer.transport.abort()

    async def _run(self, number: int) -> None:
        rng = random.Random(f"{self._seed}:{number}")
        async with contextlib.AsyncExitStack() as kept:
            session = await kept.enter_async_context(_session(keep=True)) if number % 2 else None
            while not self._stopping.is_set():
                if session is not None:
                    request = await self._ask(session, rng.choice(KINDS), rng)
                else:
                    async with _session(keep=False) as own:
                        request = await self._ask(own, rng.choice(KINDS), rng)
                if request.end in ("cut", "error"):
                    await asyncio.sleep(0.2)

    async def _ask(self, session: aiohttp.ClientSession, kind: str, rng: random.Random) -> Request:
        number = next(self._numbers)
        ask = make_ask(number, kind, rng)
        router = rng.randrange(len(self._urls))
        begun_s = self._history.now_s
        request = Request(
            number, kind, router, ask.cells, begun_s, tenant=ask.tenant, deadline_s=ask.deadline_s, on_loss=ask.on_loss
        )
        if ask.key:
            await self._ask_until_answered(session, request, ask)
        else:
            await self._send(session, request, ask)
        request.ended_s = self._history.now_s
        request.request_id = request.request_id or request_id(number)
        self._history.add_request(request)
        return request

    async def _ask_until_answered(self, session: aiohttp.ClientSession, request: Request, ask: Ask) -> None:
        """As a client with a key does: after a broken connection or a refusal the same again, at the other Router."""
        request.key = ask.key
        twin = replace(request, router=self._other(request.router), tries=[], ids=[], finishes=[])
        patient = replace(ask, leave_after=None)
        beside = asyncio.create_task(self._send(session, twin, patient), name="twin") if ask.twin else None
        await self._send(session, request, ask)
        while request.end != "answered" and self._history.now_s - request.begun_s < LIMIT_S:
            if request.end == "error" and request.code not in _ASK_AGAIN:
                break
            request.tries.append(_told(request))
            _forget(request)
            await asyncio.sleep(AGAIN_S)
            request.router = self._other(request.router)
            await self._send(session, request, patient)
        if beside is not None:
            await beside
            request.tries.append(_told(twin))
        if request.end == "answered" and request.number % REUSE_EVERY == 0:
            wrong = replace(request, tries=[], ids=[], finishes=[])
            await self._send(session, wrong, replace(patient, body=ask.other_body))
            request.reused = wrong.status

    def _other(self, router: int) -> int:
        return (router + 1) % len(self._urls)

    async def _send(self, session: aiohttp.ClientSession, request: Request, ask: Ask) -> None:
        request.status, request.request_id = 0, ""
        try:
            async with (
                asyncio.timeout(ask.patience_s),
                session.post(self._urls[request.router] + ask.path, data=ask.body, headers=ask.headers) as answer,
            ):
                request.status = answer.status
                request.request_id = answer.headers.get("x-request-id", "")
                await self._read(answer, request, ask)
        except TimeoutError:
            request.end = "silent" if ask.patience_s is None else "left"
        except (aiohttp.ClientError, OSError) as error:
            request.end, request.message = "cut", f"{type(error).__name__}: {error}"
        request.ids = sorted(set(request.ids))

    async def _read(self, answer: aiohttp.ClientResponse, request: Request, ask: Ask) -> None:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            whole = await answer.read()
            request.first_s = self._history.now_s
            _read_plain(whole, request)
            return
        async for data in events_of(answer):
            request.first_s = request.first_s or self._history.now_s
            if data == "[DONE]":
                request.done += 1
                continue
            _read_chunk(json.loads(data), request)
            if request.end == "error":
                return
            if ask.leave_after is not None and len(request.text) > 4 * ask.leave_after:
                request.end = "left"
                return
            if ask.pause_s:
                await asyncio.sleep(ask.pause_s)
        request.end = "answered"


def _told(request: Request) -> Entry:
    """What one try brought."""
    return {name: getattr(request, name) for name in ("router", "end", "status", "code", "text", "ids")}


def _forget(request: Request) -> None:
    """The next try begins."""
    request.end, request.text, request.code, request.message = "silent", "", "", ""
    request.ids, request.finishes, request.usage = [], [], {}
    request.roles = request.done = request.usages = 0


def _session(*, keep: bool) -> aiohttp.ClientSession:
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
        if keep
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=LIMIT_S))


def _read_chunk(chunk: dict[str, Any], request: Request) -> None:
    if "error" in chunk:
        request.end = "error"
        request.code, request.message = str(chunk["error"]["code"]), chunk["error"]["message"]
        return
    request.ids.append(chunk["id"])
    if chunk.get("usage"):
        request.usage, request.usages = _figures(chunk["usage"]), request.usages + 1
    for choice in chunk["choices"]:
        delta = choice.get("delta", {})
        request.text += delta.get("content") or choice.get("text") or ""
        request.roles += "role" in delta
        request.finishes += [choice["finish_reason"]] if choice.get("finish_reason") else []


def _read_plain(whole: bytes, request: Request) -> None:
    try:
        body = json.loads(whole)
    except ValueError:
        request.end, request.text = "answered", whole.decode("latin-1")
        return
    if "error" in body:
        request.end = "error"
        request.code, request.message = str(body["error"]["code"]), body["error"]["message"]
        return
    request.end = "answered"
    if body["object"] == "list":
        request.vector = body["data"][0]["embedding"][:8]
        return
    (choice,) = body["choices"]
    request.text = choice["message"]["content"] if "message" in choice else choice["text"]
    request.ids = [body["id"]]
    request.usage = _figures(body["usage"])


def _figures(usage: dict[str, Any]) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
