"""How many of our own functions the Router's hot path calls: no more than ``tests/golden/call_counts.json`` records.

It is what a change to that path costs that no clock shows on a busy machine. One that needs more must raise the figure
there; one that needs fewer lowers it, and keeps what it won.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from broker.operations.replies import parse_reply
from queue_schemas import END, HEAD, Enqueued, Frame, Job, State
from queue_schemas.frames import FRAME_FIELD
from router import RouterApp
from telemetry.http.connections import ConnectionLimits, Connections, HttpConnection, protocol_for

from .fakes import SSE, FakeQueue, router

ROOT = Path(__file__).parents[3]
RECORDED: dict[str, int] = json.loads((ROOT / "tests" / "golden" / "call_counts.json").read_text())
OUR_OWN = tuple(f"{ROOT}/{package}/" for package in ("router", "telemetry", "queue_schemas", "broker", "openai_api"))
TOKENS = 50
EVENT = b'data: {"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class FakeTransport(asyncio.Transport):
    """Takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class ReadyQueue(FakeQueue):
    """Answers every enqueue at once."""

    def start_enqueue(self, job: Job, patience_ms: int | None = None) -> asyncio.Future[Enqueued]:
        self.last = job
        answered: asyncio.Future[Enqueued] = asyncio.get_running_loop().create_future()
        answered.set_result(Enqueued(job.id, State.QUEUED))
        return answered


def counted(work: Callable[[], object]) -> int:
    """How many of our own functions ``work`` calls."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OUR_OWN):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls.total()


def connected(app: RouterApp, transport: FakeTransport) -> HttpConnection:
    config = Config(app, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    make = protocol_for(Connections(ConnectionLimits()), app.serve_directly)
    connection = make(config, state, {}, asyncio.get_running_loop())
    connection.connection_made(transport)
    return connection


def request(**fields: Any) -> bytes:
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8} | fields)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def transport() -> Iterator[FakeTransport]:
    """What the answers are written to."""
    yield FakeTransport()


async def test_a_request_and_a_token_make_no_more_calls_than_recorded(transport: FakeTransport) -> None:
    """A plain request from its bytes to the bytes of its answer; a stream's start and end; one token of it."""
    queue = ReadyQueue("m")

    def frame(seq: int, flags: int, data: bytes, kind: str = "") -> bytes:
        return Frame(queue.last.id, 1, "a", seq, flags, data, 200 if flags & HEAD else 0, kind).pack()

    def deliver(*entries: bytes) -> int:
        return counted(lambda: [queue.deliver(*parse_reply("1-0", {FRAME_FIELD: entry})) for entry in entries])

    async with router(queue) as app:
        connection = connected(app, transport)
        counts: dict[str, int] = {}
        for _ in range(2):  # what is made once is made by the first
            before = counted(lambda: connection.data_received(request()))
            await asyncio.sleep(0)
            counts["plain request"] = before + deliver(frame(0, HEAD | END, b'{"id": "c1"}', "application/json"))
            await asyncio.sleep(0)
            begin = counted(lambda: connection.data_received(request(stream=True)))
            await asyncio.sleep(0)
            begin += deliver(frame(0, HEAD, EVENT, SSE))
            tokens = deliver(*(frame(seq, 0, EVENT) for seq in range(1, TOKENS + 1)))
            end = deliver(frame(TOKENS + 1, END, b"data: [DONE]\n\n"))
            await asyncio.sleep(0)
            counts["stream without its tokens"], counts["token"] = begin + end, -(-tokens // TOKENS)
    assert transport.written.count(b"HTTP/1.1 200 OK") == 4
    assert transport.written.count(EVENT) == 2 * (TOKENS + 1)
    assert counts.keys() == RECORDED.keys()
    assert {name: count for name, count in counts.items() if count > RECORDED[name]} == {}, counts
