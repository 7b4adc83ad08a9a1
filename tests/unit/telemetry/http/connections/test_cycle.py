"""One request's answer on a connection: what is written in which pieces, and who is told that the client is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from telemetry.http.connections import RequestCycle


class FakeTransport:
    def __init__(self) -> None:
        self.ended = ""

    def get_extra_info(self, _name: str) -> None:
        return None

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class FakeConnection:
    """Notes what is written."""

    default_lines = b""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.half_closed = self.write_paused = False
        self.why_lost = "left"
        self.written: list[bytes] = []
        self.reads = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def resume_reading(self) -> None:
        self.reads += 1

    def on_response_complete(self, _cycle: RequestCycle) -> None: ...


def cycle_on(connection: FakeConnection) -> RequestCycle:
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/"}
    cycle = RequestCycle(connection, scope, keep_alive=True, remaining_bytes=0)  # type: ignore[arg-type]
    cycle.receiving = False
    return cycle


START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"


async def test_a_head_and_what_follows_at_once_are_one_write() -> None:
    """Each write is a call of the kernel."""
    connection = FakeConnection()
    cycle = cycle_on(connection)
    await cycle.send(START)
    await cycle.send({"type": "http.response.body", "body": b"body"})
    await asyncio.sleep(0)
    assert connection.written == [HEAD + b"body"]


async def test_a_head_does_not_wait_for_a_body_that_comes_later() -> None:
    """A client learns the status when it is known."""
    connection = FakeConnection()
    cycle = cycle_on(connection)
    await cycle.send(START)
    await asyncio.sleep(0)
    assert connection.written == [HEAD]
    await cycle.send({"type": "http.response.body", "body": b"body"})
    assert connection.written == [HEAD, b"body"]


@pytest.mark.parametrize("method", ["POST", "HEAD"])
async def test_an_answer_without_a_body_is_its_head(method: str) -> None:
    """Also where a body is sent to be discarded."""
    connection = FakeConnection()
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": "/"}
    cycle = RequestCycle(connection, scope, keep_alive=True, remaining_bytes=0)  # type: ignore[arg-type]
    cycle.receiving = False
    await cycle.send({"type": "http.response.start", "status": 204, "headers": []})
    await cycle.send({"type": "http.response.body", "body": b"" if method == "POST" else b"dropped"})
    assert connection.written == [b"HTTP/1.1 204 No Content\r\n\r\n"]


async def test_an_app_that_fails_behind_its_head_has_sent_it() -> None:
    """Then the connection breaks: the client can tell that the answer is not whole."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(START)
        raise ValueError("on purpose")

    connection = FakeConnection()
    await cycle_on(connection).run(app)
    assert (connection.written, connection.transport.ended) == ([HEAD], "aborted")


async def test_whoever_watches_is_told_once_that_the_client_is_gone() -> None:
    """With the reason; and the connection is read, or its end would not be seen."""
    connection = FakeConnection()
    connection.why_lost = "stalled"
    cycle, told = cycle_on(connection), list[str]()
    cycle.watch(told.append)
    assert connection.reads == 1
    cycle.leave()
    cycle.leave()
    assert told == ["stalled"]


async def test_one_who_watches_no_more_is_told_nothing() -> None:
    """As before the last part of an answer."""
    cycle, told = cycle_on(FakeConnection()), list[str]()
    cycle.watch(told.append)
    cycle.watch(None)
    cycle.leave()
    assert told == []


async def test_a_client_that_is_gone_already_is_reported_in_the_next_step() -> None:
    """Not within the call: the request may be about to wait for the queue, which this has to interrupt."""
    cycle, told = cycle_on(FakeConnection()), list[str]()
    cycle.leave()
    cycle.watch(told.append)
    assert told == []
    await asyncio.sleep(0)
    assert told == ["left"]


async def test_a_client_that_sends_no_more_is_gone_once_its_request_was_read() -> None:
    """Nobody can tell a closed connection from a half-closed one."""
    connection = FakeConnection()
    cycle, told = cycle_on(connection), list[str]()
    connection.half_closed = True
    cycle.watch(told.append)
    cycle.end_of_input()
    assert told == [], "its body was not read"
    assert (await cycle.receive())["type"] == "http.request"
    cycle.end_of_input()
    assert told == ["left"]
