"""Generate the load: clients of several kinds that record all they see, and check nothing."""

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

from tests.support.sse import read_data

from .history import Entry, History, Request
from .workload import BACKGROUND, KINDS, OutgoingRequest, make_request, request_id

LIMIT_S = 45.0
"""A request that takes longer counts as lost."""
RETRY_PAUSE_S = 0.2
ACCEPTED = 202
REUSE_EVERY = 5
"""One in so many requests with a key is followed by another body under the same key."""
_RETRYABLE = ("broker_unavailable", "broker_full", "shutting_down", "job_not_found")
"""The last one: a Redis that was killed may have lost the background jobs of its last second."""
BACKGROUND_CLIENTS = 18
"""Clients that send nothing but background requests: with the others, more than there are slots."""
KEEPALIVE_S = 2.0
"""How long a client keeps an idle connection: the Router closes none that soon."""
_RAW: tuple[bytes, ...] = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + b"x-y: " + b"z" * 100_000 + b"\r\n\r\n",
)


class Clients:
    """``count`` clients of ``urls``, each with one request at a time; every other one keeps its connections open.
    Beside them are ``BACKGROUND_CLIENTS``, whose requests yield to theirs."""

    def __init__(self, urls: Sequence[str], history: History, *, seed: int, count: int = 18) -> None:
        self._urls = urls
        self._history = history
        self._seed = seed
        self._count = count
        self._numbers = itertools.count()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all clients."""
        kinds = [KINDS] * self._count + [(BACKGROUND,)] * BACKGROUND_CLIENTS
        self._tasks = [asyncio.create_task(self._run(number, own), name="client") for number, own in enumerate(kinds)]

    async def stop(self) -> None:
        """Let each running request finish or reach its time limit."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    def abort(self) -> None:
        """Cancel all clients at once; record nothing more."""
        for task in self._tasks:
            task.cancel()

    async def burst(self, kind: str, count: int, concurrency: int) -> None:
        """``count`` requests of one kind, ``concurrency`` of them at any time."""
        rng = random.Random(next(self._numbers))
        left = iter(range(count))

        async def one_after_the_other(session: aiohttp.ClientSession) -> None:
            for _ in left:
                await self._send_one(session, kind, rng)

        async with _session(keep=False) as session:
            await asyncio.gather(*(one_after_the_other(session) for _ in range(concurrency)))

    async def slowloris(self, count: int, duration_s: float) -> None:
        """Open ``count`` connections that send an endless request byte by byte, or bytes that are no request."""
        await asyncio.gather(*(self._send_slowly(number, duration_s) for number in range(count)))

    async def _send_slowly(self, number: int, duration_s: float) -> None:
        url = urlsplit(self._urls[number % len(self._urls)])
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(url.hostname, url.port)
            try:
                if number % 3 == 0:
                    writer.write(_RAW[number // 3 % len(_RAW)])
                else:
                    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
                    writer.write(head + (b"" if number % 3 == 1 else b"authorization: Bearer acme\r\n\r\n{"))
                for _ in range(int(duration_s / 0.25)):
                    await asyncio.sleep(0.25)
                    if writer.is_closing():
                        break
                    writer.write(b" ")
            finally:
                writer.transport.abort()

    async def _run(self, number: int, kinds: Sequence[str]) -> None:
        rng = random.Random(f"{self._seed}:{number}")
        async with contextlib.AsyncExitStack() as kept:
            session = await kept.enter_async_context(_session(keep=True)) if number % 2 else None
            while not self._stopping.is_set():
                if session is not None:
                    request = await self._send_one(session, rng.choice(kinds), rng)
                else:
                    async with _session(keep=False) as own:
                        request = await self._send_one(own, rng.choice(kinds), rng)
                if request.end in ("cut", "error"):
                    await asyncio.sleep(0.2)

    async def _send_one(self, session: aiohttp.ClientSession, kind: str, rng: random.Random) -> Request:
        number = next(self._numbers)
        outgoing = make_request(number, kind, rng)
        router = rng.randrange(len(self._urls))
        sent_s = self._history.now_s
        request = Request(
            number,
            kind,
            router,
            outgoing.cells,
            sent_s,
            tenant=outgoing.tenant,
            deadline_s=outgoing.deadline_s,
            on_loss=outgoing.on_loss,
        )
        if outgoing.key:
            await self._retry_until_answered(session, request, outgoing)
        else:
            await self._send(session, request, outgoing)
        request.ended_s = self._history.now_s
        request.request_id = request.request_id or request_id(number)
        self._history.add_request(request)
        return request

    async def _retry_until_answered(
        self, session: aiohttp.ClientSession, request: Request, outgoing: OutgoingRequest
    ) -> None:
        """Retry as a client with a key does: after a broken connection or a refusal, at the other Router."""
        request.key = outgoing.key
        twin = replace(request, router=self._other(request.router), tries=[], ids=[], finishes=[])
        persistent = replace(outgoing, leave_after_cells=None)
        beside = asyncio.create_task(self._send(session, twin, persistent), name="twin") if outgoing.twin else None
        await self._send(session, request, outgoing)
        while request.end != "answered" and self._history.now_s - request.sent_s < LIMIT_S:
            if request.end == "error" and request.code not in _RETRYABLE:
                break
            request.tries.append(_try_fields(request))
            _reset(request)
            await asyncio.sleep(RETRY_PAUSE_S)
            request.router = self._other(request.router)
            await self._send(session, request, persistent)
        if beside is not None:
            await beside
            request.tries.append(_try_fields(twin))
        if request.end == "answered" and request.number % REUSE_EVERY == 0:
            wrong = replace(request, tries=[], ids=[], finishes=[])
            await self._send(session, wrong, replace(persistent, body=outgoing.other_body))
            request.reused = wrong.status

    def _other(self, router: int) -> int:
        return (router + 1) % len(self._urls)

    async def _send(self, session: aiohttp.ClientSession, request: Request, outgoing: OutgoingRequest) -> None:
        request.status, request.request_id = 0, ""
        try:
            async with (
                asyncio.timeout(outgoing.leave_after_s),
                session.post(
                    self._urls[request.router] + outgoing.path, data=outgoing.body, headers=outgoing.headers
                ) as answer,
            ):
                request.status = answer.status
                request.request_id = answer.headers.get("x-request-id", "")
                if outgoing.kind == BACKGROUND and answer.status == ACCEPTED:
                    await self._follow(session, (await answer.json())["id"], request, outgoing)
                else:
                    await self._read(answer, request, outgoing)
        except TimeoutError:
            request.end = "silent" if outgoing.leave_after_s is None else "left"
        except (aiohttp.ClientError, OSError) as error:
            request.end, request.message = "cut", f"{type(error).__name__}: {error}"
        request.ids = sorted(set(request.ids))

    async def _follow(
        self, session: aiohttp.ClientSession, job_id: str, request: Request, outgoing: OutgoingRequest
    ) -> None:
        """The answer of a background request, at any Router."""
        url = f"{self._urls[self._other(request.router)]}/v1/jobs/{job_id}/output"
        async with session.get(url, headers=outgoing.headers) as answer:
            request.status = answer.status
            await self._read(answer, request, outgoing)

    async def _read(self, answer: aiohttp.ClientResponse, request: Request, outgoing: OutgoingRequest) -> None:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            whole = await answer.read()
            request.first_byte_s = self._history.now_s
            _read_plain(whole, request)
            return
        async for data in read_data(answer):
            request.first_byte_s = request.first_byte_s or self._history.now_s
            if data == "[DONE]":
                request.done += 1
                continue
            _read_chunk(json.loads(data), request)
            if request.end == "error":
                return
            if outgoing.leave_after_cells is not None and len(request.text) > 4 * outgoing.leave_after_cells:
                request.end = "left"
                return
            if outgoing.pause_s:
                await asyncio.sleep(outgoing.pause_s)
        request.end = "answered"


def _try_fields(request: Request) -> Entry:
    """The fields that one try recorded."""
    return {name: getattr(request, name) for name in ("router", "end", "status", "code", "text", "ids")}


def _reset(request: Request) -> None:
    """Clear the fields for the next try."""
    request.end, request.text, request.code, request.message = "silent", "", "", ""
    request.ids, request.finishes, request.usage = [], [], {}
    request.roles = request.done = request.usages = 0


def _session(*, keep: bool) -> aiohttp.ClientSession:
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
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
        request.usage, request.usages = _token_counts(chunk["usage"]), request.usages + 1
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
    request.usage = _token_counts(body["usage"])


def _token_counts(usage: dict[str, Any]) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
