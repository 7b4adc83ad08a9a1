"""The load generator: one process, one asyncio protocol per client, each with one request in flight.

It writes prepared bytes and reads no more of an answer than it must, so that on a machine with few cores it takes
little from what it measures. ``python -m bench.loadgen '{...}'`` (the fields of :class:`Load` as JSON) warms up, prints
``ready``, waits for a line on standard input, runs, and prints the :class:`Result` as JSON. Any answer that is not the
expected one ends the run with an error.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from time import perf_counter
from typing import cast

import uvloop

PROMPTS = 64
END_OF_CHUNKS = b"0\r\n\r\n"
EVENT = b"data: "
EVENTS_WITHOUT_TOKEN = 3
"""In each stream: the role, the reason it ended, and ``[DONE]``."""
DRAIN_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a server: ``clients`` connections for ``seconds``, chats of ``prompt_bytes`` and between
    ``min_tokens`` and ``max_tokens`` tokens of answer, drawn by ``seed``."""

    port: int
    model: str
    clients: int
    seconds: float
    stream: bool = False
    warmup_s: float = 1.0
    prompt_bytes: int = 1000
    min_tokens: int = 32
    max_tokens: int = 32
    seed: int = 1
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``rate`` counts requests answered within the time; the counts and latencies also those that it caught in flight.

    For a stream ``first_ms`` is the time to the first event and ``gap_ms`` the time between reads that brought tokens.
    """

    requests: int
    tokens: int
    rate: float
    latency_ms: dict[str, float] = field(default_factory=dict)
    first_ms: dict[str, float] = field(default_factory=dict)
    gap_ms: dict[str, float] = field(default_factory=dict)


class UnexpectedAnswer(Exception):
    """A server did not answer as it should."""


class _Run:
    """One timed run of all clients."""

    def __init__(self, requests: Iterator[tuple[bytes, int]], seconds: float, *, stream: bool) -> None:
        self.stream = stream
        self.requests = requests
        self.until = perf_counter() + seconds
        self.seconds = seconds
        self.in_time = 0
        self.tokens = 0
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, what: str) -> None:
        if not self.failed.done():
            self.failed.set_exception(UnexpectedAnswer(what))

    def result(self) -> Result:
        return Result(
            requests=len(self.latencies),
            tokens=self.tokens,
            rate=self.in_time / self.seconds,
            latency_ms=_percentiles(self.latencies),
            first_ms=_percentiles(self.firsts),
            gap_ms=_percentiles(self.gaps),
        )


class _Client(asyncio.Protocol):
    """One connection: asks, reads the answer to its end, asks again until time is up."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by behaviour only
        self._ask()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            data = self._read_head(data)
            if not data:
                return
        if self._run.stream:
            self._read_events(data)
        else:
            self._left -= len(data)
            if self._left == 0:
                self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._run.fail(f"connection lost: {exc or 'closed by the server'}")

    def _ask(self) -> None:
        self._in_head = True
        self._head = b""
        self._events = 0
        self._tail = b""
        request, self._tokens = next(self._run.requests)
        self._sent_at = self._last_read_at = perf_counter()
        self._transport.write(request)

    def _read_head(self, data: bytes) -> bytes:
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return b""
        head, rest = self._head[:end].lower(), self._head[end + 4 :]
        if not head.startswith(b"http/1.1 200"):
            self._run.fail(self._head[:400].decode("latin-1"))
            return b""
        self._in_head = False
        at = head.find(b"content-length: ")
        if at < 0 and not self._run.stream:
            self._run.fail("a plain answer without a length")
        self._left = 0 if at < 0 else int(head[at + 16 :].split(b"\r\n", 1)[0])
        return rest

    def _read_events(self, data: bytes) -> None:
        now = perf_counter()
        joined = self._tail + data
        found = joined.count(EVENT) - self._tail.count(EVENT)
        if found:
            if not self._events:
                self._run.firsts.append(now - self._sent_at)
            else:
                self._run.gaps.append(now - self._last_read_at)
            self._last_read_at = now
            self._events += found
        self._tail = joined[-len(END_OF_CHUNKS) :]
        if self._tail == END_OF_CHUNKS:
            if self._events != self._tokens + EVENTS_WITHOUT_TOKEN:
                self._run.fail(f"{self._events} events for {self._tokens} tokens")
            self._answered()

    def _answered(self) -> None:
        now, run = perf_counter(), self._run
        run.latencies.append(now - self._sent_at)
        run.tokens += self._tokens
        if now < run.until:
            run.in_time += 1
            self._ask()
        else:
            self.done.set_result(None)
            self._transport.close()


async def run_load(load: Load, requests: Iterator[tuple[bytes, int]], seconds: float) -> Result:
    """Put ``load`` on the server for ``seconds`` and wait for what is in flight then."""
    run = _Run(requests, seconds, stream=load.stream)
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(load.clients):
        _, client = await loop.create_connection(lambda: _Client(run), load.host, load.port)
        clients.append(client.done)
    finished = asyncio.gather(*clients)
    async with asyncio.timeout(seconds + DRAIN_LIMIT_S):
        await asyncio.wait((finished, run.failed), return_when=asyncio.FIRST_COMPLETED)
    if run.failed.done():
        await run.failed
    return run.result()


def prepared_requests(load: Load) -> list[tuple[bytes, int]]:
    """Requests as bytes, each with the number of tokens it will get."""
    draw = random.Random(load.seed)
    return [_request(load, number, draw.randint(load.min_tokens, load.max_tokens)) for number in range(PROMPTS)]


def _request(load: Load, number: int, tokens: int) -> tuple[bytes, int]:
    text = f"{number}: " + "Tell me of the sea and its ships. " * (load.prompt_bytes // 34)
    fields = {
        "model": load.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": load.stream,
    }
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body, tokens


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in ms."""
    if not seconds:
        return {}
    ranked = sorted(seconds)
    return {
        f"p{percent}": round(ranked[min(len(ranked) - 1, math.ceil(len(ranked) * percent / 100) - 1)] * 1e3, 4)
        for percent in (50, 90, 99)
    }


async def _main(load: Load) -> None:
    requests = cycle(prepared_requests(load))
    await run_load(load, requests, load.warmup_s)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    result = await run_load(load, requests, load.seconds)
    sys.stdout.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    uvloop.run(_main(Load(**json.loads(sys.argv[1]))))
