"""Held calls of workers: one for each session and shard, answered at once by news, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from queue_schemas import BrokerUnavailable, Control, ControlKind, InferqError, OverCapacity, SessionId
from router.workers import polls as module
from router.workers.polls import Polls
from router.workers.rules import WorkerScope

SESSION = SessionId("edge.0123456789abcdef")
WAKE = ("1-0", Control(ControlKind.WAKE))


class Stream:
    """A control stream: what is put reaches the read that waits."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, str, str, int]] = []
        self.cancelled = 0
        self._news: asyncio.Queue[tuple[str, Control] | InferqError] = asyncio.Queue()

    def put(self, news: tuple[str, Control] | InferqError) -> None:
        self._news.put_nowait(news)

    async def read(
        self, shard: int, session_id: SessionId, after: str, block_ms: int
    ) -> Sequence[tuple[str, Control | None]]:
        self.reads.append((shard, session_id, after, block_ms))
        try:
            async with asyncio.timeout(block_ms / 1000):
                news = await self._news.get()
        except TimeoutError:
            return ()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(news, InferqError):
            raise news
        return (news,)


async def test_a_held_call_is_answered_by_news_or_when_its_time_is_over() -> None:
    """With the messages, or with none."""
    polls, stream = Polls(), Stream()
    held = asyncio.ensure_future(polls.messages(stream.read, 0, SESSION, "0", 5.0))
    await asyncio.sleep(0.01)
    stream.put(WAKE)
    assert await held == (WAKE,)
    assert await polls.messages(stream.read, 0, SESSION, "1-0", 0.02) == ()
    assert polls.waiting == 0


async def test_a_later_call_ends_the_one_that_is_held_and_goes_on_with_its_read() -> None:
    """However often a worker asks: one call is held, and the queue is read once."""
    polls, stream = Polls(), Stream()
    held = [asyncio.ensure_future(polls.messages(stream.read, 0, SESSION, "0", 5.0)) for _ in range(1_000)]
    await asyncio.sleep(0.05)
    assert [call.done() for call in held] == [True] * 999 + [False]
    assert (polls.waiting, len(stream.reads)) == (1, 1)
    stream.put(WAKE)
    assert await held[-1] == (WAKE,)


async def test_news_that_come_between_two_calls_are_there_for_the_next() -> None:
    """Nothing that was read is lost; so is the error that says that the queue was away."""
    polls, stream = Polls(), Stream()
    for news in (WAKE, BrokerUnavailable("it was away")):
        assert await polls.messages(stream.read, 0, SESSION, "0", 0.01) == ()
        stream.put(news)
        await asyncio.sleep(0.01)
        if isinstance(news, InferqError):
            with pytest.raises(BrokerUnavailable):
                await polls.messages(stream.read, 0, SESSION, "0", 0.01)
        else:
            assert await polls.messages(stream.read, 0, SESSION, "0", 0.01) == (WAKE,)
    assert len(stream.reads) == 2


async def test_sessions_are_bounded_for_each_credential_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker cannot have a Router read for sessions without end: each costs a connection to Redis."""
    polls = Polls()
    scope = WorkerScope(name="edge", workers=2)
    refused = 0
    for number in range(10_000):
        try:
            polls.called(scope, SessionId(f"edge.{number:016x}"))
        except OverCapacity:
            refused += 1
    assert refused == 10_000 - (4 * 2 + 4)
    monkeypatch.setattr(module, "MAX_SESSIONS", 20)
    unlimited = WorkerScope.unlimited()
    for number in range(8):
        polls.called(unlimited, SessionId(f"other.{number:016x}"))
    with pytest.raises(OverCapacity):
        polls.called(unlimited, SessionId("one.0000000000000000"))
    polls.called(unlimited, SessionId(f"other.{1:016x}"))


async def test_a_session_that_calls_no_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its read is cancelled, and another one may take its place."""
    polls, stream = Polls(), Stream()
    polls.called(WorkerScope.unlimited(), SESSION)
    await polls.messages(stream.read, 0, SESSION, "0", 0.01)
    assert polls.sweep() == []
    monkeypatch.setattr(module, "FORGET_S", 0.0)
    await asyncio.sleep(0.01)
    assert polls.sweep() == [SESSION]
    await asyncio.sleep(0.01)
    assert stream.cancelled == 1
    assert polls.sweep() == []


async def test_a_session_that_leaves_has_its_held_call_answered() -> None:
    """Empty: it is no error to leave while a call is held."""
    polls, stream = Polls(), Stream()
    polls.called(WorkerScope.unlimited(), SESSION)
    held = asyncio.ensure_future(polls.messages(stream.read, 0, SESSION, "0", 5.0))
    await asyncio.sleep(0.01)
    polls.forget(SESSION)
    assert await held == ()


async def test_all_calls_are_ended_at_once() -> None:
    """When credentials change, and at a shutdown."""
    polls, stream = Polls(), Stream()
    held = [asyncio.ensure_future(polls.messages(stream.read, shard, SESSION, "0", 5.0)) for shard in range(3)]
    await asyncio.sleep(0.01)
    polls.end_all()
    assert await asyncio.gather(*held) == [(), (), ()]
