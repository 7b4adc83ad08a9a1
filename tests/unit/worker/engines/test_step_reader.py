"""Streams that are read together, a step of the engine at a time."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial

import pytest
import uvloop

from queue_schemas import EngineFailed
from tests.support.waiting import eventually
from tests.unit.worker.engines.test_http import CALL, CHUNKED, PLAIN, engine_that, says, then_closes
from worker.engines import EngineGone, StepReader
from worker.engines import step_reader as module
from worker.engines.http import HttpEngine

FIRST = b"3\r\n1\n\n\r\n"
SECOND = b"3\r\n2\n\n\r\n"
END = b"0\r\n\r\n"


class Steps:
    """A reader of ``count`` streams, each a socket that its engine writes to; ``flushed`` has what each step read."""

    def __init__(self, count: int, max_wait_s: float) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self.engine = [one for one, _ in pairs]
        self._ends = [other for _, other in pairs]
        self.flushed: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()
        self._read = b""
        self.reader = StepReader(self._flush, max_wait_s=max_wait_s)
        for end in self._ends:
            self.reader.add(end.fileno(), lambda end=end: self._take(end.recv(100)))  # type: ignore[misc]

    def write(self, *streams: int) -> None:
        for number in streams:
            self.engine[number].send(b"%d" % number)

    def remove(self, number: int) -> None:
        self.reader.remove(self._ends[number].fileno())

    async def until(self, count: int) -> None:
        await eventually(lambda: len(self.flushed) >= count, f"{count} flushes", every_s=0.0005)

    def close(self) -> None:
        for one in (*self.engine, *self._ends):
            one.close()

    def _take(self, data: bytes) -> None:
        self._read += data

    async def _flush(self) -> None:
        self.flushed.append(self._read)
        self._read = b""
        await self.open.wait()


@asynccontextmanager
async def steps(count: int, max_wait_s: float = 60.0) -> AsyncIterator[Steps]:
    reading = Steps(count, max_wait_s)
    task = asyncio.create_task(reading.reader.run())
    try:
        yield reading
    finally:
        task.cancel()
        reading.close()


async def test_streams_of_one_step_are_read_and_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for those that follow, and nobody waits once all are there."""
    monkeypatch.setattr(module, "TICK_S", 0.2)
    async with steps(4) as reading:
        reading.write(0)
        await asyncio.sleep(0.01)
        reading.write(1, 2, 3)
        await reading.until(1)
        assert reading.flushed == [b"0123"]


async def test_a_lone_stream_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody to wait for there is no tick."""
    monkeypatch.setattr(module, "TICK_S", 60.0)
    async with steps(1) as reading:
        for count in range(1, 4):
            reading.write(0)
            await reading.until(count)
        assert reading.flushed == [b"0"] * 3


async def test_a_stream_that_stands_still_costs_its_neighbours_a_tick() -> None:
    """They do not wait for as long as they may: a minute here."""
    async with steps(3) as reading:
        for count in range(1, 4):
            reading.write(0, 1)
            await reading.until(count)
        assert reading.flushed == [b"01"] * 3


async def test_a_step_that_goes_on_and_on_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that come one by one wait for each other, but never longer than they may."""
    monkeypatch.setattr(module, "TICK_S", 0.05)
    async with steps(12, max_wait_s=0.12) as reading:
        for number in range(10):
            reading.write(number)
            await asyncio.sleep(0.04)
        await reading.until(2)
        assert len(reading.flushed[0]) > 1


async def test_nothing_is_read_until_what_was_read_is_sent() -> None:
    """What comes meanwhile is one read: an engine that is faster than the queue fills its own socket."""
    async with steps(2) as reading:
        reading.open.clear()
        reading.write(0, 1)
        await reading.until(1)
        assert reading.reader.is_flushing
        for _ in range(3):
            reading.write(0, 1)
        await asyncio.sleep(0.02)
        assert reading.flushed == [b"01"]
        reading.open.set()
        await reading.until(2)
        assert reading.flushed[1] == b"000111"
        await eventually(lambda: not reading.reader.is_flushing, "it reads again", every_s=0.001)


async def test_a_stream_that_is_removed_is_read_no_more() -> None:
    """Nor is it waited for; removing it again changes nothing."""
    async with steps(2) as reading:
        reading.remove(1)
        reading.remove(1)
        reading.write(0, 1)
        await reading.until(1)
        assert reading.flushed == [b"0"]


@asynccontextmanager
async def reader() -> AsyncIterator[StepReader]:
    """A reader whose steps have nothing to send."""
    one = StepReader(lambda: asyncio.sleep(0), max_wait_s=0.004)
    task = asyncio.create_task(one.run())
    try:
        yield one
    finally:
        task.cancel()


async def read_behind_the_first(engine: HttpEngine, steps: StepReader, begun: asyncio.Event) -> None:
    """Take the first piece of an answer, set ``begun``, and have the rest read in steps."""
    async with engine.call(CALL) as answer:
        await anext(answer.chunks())
        begun.set()
        await answer.read_in_steps(steps, lambda _: None)


async def test_a_reader_that_has_ended_keeps_nothing_open() -> None:
    """Neither its own descriptor nor what it was to read."""
    async with reader() as one:
        first, second = socket.socketpair()
        one.add(first.fileno(), lambda: None)
        await asyncio.sleep(0)
        assert one.is_open
    await eventually(lambda: not one.is_open, "it is closed")
    one.remove(first.fileno())
    first.close()
    second.close()


async def test_without_epoll_no_stream_is_read_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: the answer comes in pieces, as it does over TLS."""
    monkeypatch.delattr(select, "epoll")

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLAIN)

    async with reader() as one, engine_that(respond) as (engine, _), engine.call(CALL) as answer:
        assert not one.is_open
        assert not await answer.read_in_steps(one, lambda _: None)
        assert await answer.read(1_000)


async def test_an_answer_is_read_to_its_end_in_steps_and_its_connection_is_used_again() -> None:
    """Every piece is passed on, in order; the end is seen; the next call finds the connection as it was."""
    goes_on = asyncio.Event()

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(raw.requests) == 2:
            writer.write(PLAIN)
            return
        writer.write(CHUNKED + FIRST)
        await goes_on.wait()
        writer.write(SECOND)
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(SECOND[:4])
        await asyncio.sleep(0.01)
        writer.write(SECOND[4:] + END)

    async with reader() as steps, engine_that(respond) as (engine, raw):
        taken: list[bytes] = []
        async with engine.call(CALL) as answer:
            pieces = answer.chunks()
            assert await anext(pieces) == b"1\n\n"
            goes_on.set()
            assert await answer.read_in_steps(steps, taken.append)
            assert answer.delimited
        assert b"".join(taken) == b"2\n\n2\n\n"
        assert len(taken) > 1
        async with engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        assert raw.connections == 1


async def test_what_arrived_before_the_steps_is_passed_on_first() -> None:
    """On a slow way to the queue something always has: those streams are read in steps too, in order."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await asyncio.wait_for(begun.wait(), 5)
        writer.write(SECOND)
        await eventually(lambda: steps._reads, "it is read in steps")
        writer.write(FIRST + END)

    begun, taken = asyncio.Event(), list[bytes]()
    async with reader() as steps, engine_that(respond) as (engine, _), engine.call(CALL) as answer:
        await anext(answer.chunks())
        begun.set()
        await eventually(lambda: answer._connection._parts, "the second event is here")  # type: ignore[attr-defined]
        assert await answer.read_in_steps(steps, taken.append)
    assert taken == [b"2\n\n", b"1\n\n"]


async def test_an_answer_that_is_here_whole_is_not_read_in_steps() -> None:
    """It needs no reader."""
    async with reader() as steps, engine_that(says(CHUNKED + FIRST + END)) as (engine, _), engine.call(CALL) as answer:
        await eventually(lambda: answer._connection.complete, "all is here")  # type: ignore[attr-defined]
        assert not await answer.read_in_steps(steps, lambda _: None)
        assert [piece async for piece in answer.chunks()] == [b"1\n\n"]


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_breaks_between_steps_is_an_engine_failure(reset: bool) -> None:
    """Closed or reset: what came is passed on, then the failure is raised."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await asyncio.wait_for(begun.wait(), 5)
        writer.write(SECOND)
        await writer.drain()
        await asyncio.sleep(0.02)
        if reset:
            writer.transport.abort()
        writer.close()

    begun, taken = asyncio.Event(), list[bytes]()
    async with reader() as steps, engine_that(respond) as (engine, _):
        with pytest.raises(EngineGone, match="before its answer was complete"):
            async with engine.call(CALL) as answer:
                await anext(answer.chunks())
                begun.set()
                await answer.read_in_steps(steps, taken.append)
        assert taken == [b"2\n\n"]
        assert not steps._reads


async def test_an_answer_that_the_connections_end_ends_is_complete_but_not_delimited() -> None:
    """Without length or chunks the end of the connection is the end, in steps as otherwise."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n1\n\n"
    async with reader() as steps, engine_that(then_closes(head)) as (engine, _), engine.call(CALL) as answer:
        await anext(answer.chunks())
        await answer.read_in_steps(steps, lambda _: None)
        assert [piece async for piece in answer.chunks()] == []
        assert not answer.delimited


async def test_a_reset_ends_no_answer() -> None:
    """Nor one that the end of the connection ends: its engine has died, and the failure says how."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n1\n\n")
        await asyncio.wait_for(begun.wait(), 5)
        await eventually(lambda: steps._reads, "it is read in steps")
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    begun = asyncio.Event()
    async with reader() as steps, engine_that(respond) as (engine, _):
        with pytest.raises(EngineGone, match="reset by peer"):
            await read_behind_the_first(engine, steps, begun)


async def test_what_is_no_http_between_steps_is_an_engine_failure() -> None:
    """The parser's verdict reaches the one who waits."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await asyncio.wait_for(begun.wait(), 5)
        writer.write(b"no chunk\r\n")

    begun = asyncio.Event()
    async with reader() as steps, engine_that(respond) as (engine, _):
        with pytest.raises(EngineFailed, match="does not speak HTTP"):
            await read_behind_the_first(engine, steps, begun)


@pytest.mark.parametrize("last", [SECOND, SECOND + END])
async def test_what_came_before_what_is_no_http_is_passed_on(last: bytes) -> None:
    """Whether the answer was complete, and bytes came behind it, or was not: no event that arrived whole is lost."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await asyncio.wait_for(begun.wait(), 5)
        writer.write(last + b"no chunk\r\n")

    begun, taken = asyncio.Event(), list[bytes]()
    async with reader() as steps, engine_that(respond) as (engine, _), engine.call(CALL) as answer:
        await anext(answer.chunks())
        begun.set()
        if last.endswith(END):
            assert await answer.read_in_steps(steps, taken.append)
        else:
            with pytest.raises(EngineFailed, match="does not speak HTTP"):
                await answer.read_in_steps(steps, taken.append)
    assert taken == [b"2\n\n"]


async def test_what_the_taker_raises_reaches_the_one_who_waits() -> None:
    """It stops this stream alone: the reader goes on with the others."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await asyncio.wait_for(begun.wait(), 5)
        writer.write(SECOND + END)

    def refuse(_data: bytes) -> None:
        raise ValueError("too much")

    begun = asyncio.Event()
    async with reader() as steps, engine_that(respond) as (engine, _):
        for take, raises in ((refuse, True), (lambda _: None, False)):
            begun.clear()
            async with engine.call(CALL) as answer:
                await anext(answer.chunks())
                begun.set()
                if raises:
                    with pytest.raises(ValueError, match="too much"):
                        await answer.read_in_steps(steps, take)
                else:
                    assert await answer.read_in_steps(steps, take)


async def test_a_call_that_is_cancelled_between_steps_closes_its_connection() -> None:
    """The engine sees it and aborts; the reader has forgotten the socket."""

    async def respond(_request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + FIRST)
        await writer.drain()
        await reader.readexactly(1)

    async with reader() as steps, engine_that(respond) as (engine, raw):

        async def call() -> None:
            async with engine.call(CALL) as answer:
                await anext(answer.chunks())
                await answer.read_in_steps(steps, lambda _: None)

        task = asyncio.create_task(call())
        await eventually(lambda: steps._reads, "it is read in steps")
        task.cancel()
        await eventually(lambda: raw.closed == 1, "the engine sees the connection close")
        assert not steps._reads


@pytest.mark.parametrize(
    "scenario",
    [
        test_an_answer_is_read_to_its_end_in_steps_and_its_connection_is_used_again,
        test_what_arrived_before_the_steps_is_passed_on_first,
        partial(test_a_connection_that_breaks_between_steps_is_an_engine_failure, reset=False),
        partial(test_a_connection_that_breaks_between_steps_is_an_engine_failure, reset=True),
        test_an_answer_that_the_connections_end_ends_is_complete_but_not_delimited,
        test_a_reset_ends_no_answer,
        test_what_is_no_http_between_steps_is_an_engine_failure,
        partial(test_what_came_before_what_is_no_http_is_passed_on, SECOND),
        partial(test_what_came_before_what_is_no_http_is_passed_on, SECOND + END),
        test_what_the_taker_raises_reaches_the_one_who_waits,
        test_a_call_that_is_cancelled_between_steps_closes_its_connection,
    ],
)
def test_it_is_the_same_on_the_loop_that_workers_use(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    """Sockets are read beside their transports, which differ: the tests above run on asyncio's, these on uvloop's."""
    uvloop.run(scenario())
