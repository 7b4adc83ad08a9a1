"""Run one request in a simulated engine: wait for a slot, then for each token, and fail if so ordered."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from openai_api.sse import DONE_EVENT, encode_event

from .api import wire
from .failures import Failure, FailureKind
from .schedule import Pace, Prefill, Slots

HANG_LIMIT_S = 3600.0
MAX_TIMER_S = 86_400.0
COUNT_INTERVAL_S = 0.25
"""How often a plain answer, which nobody sees before its end, counts the tokens it has so far."""


class EngineCrashed(Exception):
    """The engine's process must end now."""


class ConnectionClosed(Exception):
    """The connection must close now, after ``partial``, in place of an answer of ``total`` bytes."""

    def __init__(self, partial: bytes = b"", total: int = 0) -> None:
        super().__init__("closed before the answer was complete, as ordered")
        self.partial = partial
        self.total = total


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do. ``admit`` asks the prefix cache once it has a slot and gives the tokens held; ``plain``
    (body) and ``usage`` take those. ``steps`` engine steps give ``width`` tokens each; ``stream`` is None for a plain
    answer."""

    number: int
    prompt_tokens: int
    admit: Callable[[], int]
    steps: int
    width: int
    finish: str
    stream: wire.AnswerWire | None
    plain: Callable[[int], bytes]
    usage: Callable[[int], wire.Usage]
    failure: Failure | None


class EngineCore:
    """What the runs of one engine share: its slots, its pace, its counters, and its end.

    ``clock`` gives seconds. After :meth:`crash` every wait in it raises :class:`EngineCrashed`.
    """

    def __init__(self, slots: Slots, pace: Pace, clock: Callable[[], float]) -> None:
        self.slots = slots
        self.pace = pace
        self.prefill = Prefill()
        self.clock = clock
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished: Counter[str] = Counter()
        self._crashed = False
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._preempted: set[int] = set()
        self._sleepers: set[asyncio.Future[None]] = set()

    def crash(self) -> None:
        """End every run at once."""
        self._crashed = True
        for waiter in (*self._sleepers, *self._turns.values()):
            if not waiter.done():
                waiter.set_exception(EngineCrashed())

    @asynccontextmanager
    async def slot(self, number: int, prompt_tokens: int) -> AsyncIterator[None]:
        """Hold a slot for request ``number``, waiting for one in order."""
        try:
            if not self.slots.arrive(number, prompt_tokens):
                await self._turn(number)
            yield
        finally:
            self._turns.pop(number, None)
            self._preempted.discard(number)
            for following in self.slots.leave(number):
                if (turn := self._turns.get(following)) is not None:
                    _wake(turn)

    async def keeps_slot(self, number: int, tokens: int) -> bool:
        """Whether request ``number``, which has ``tokens`` now, runs on. False: it was preempted, by itself or another,
        and runs again now."""
        if number not in self._preempted:
            self._preempted.update(self.slots.grow(number, tokens))
            if number not in self._preempted:
                return True
        self._preempted.discard(number)
        if not self.slots.runs(number):
            await self._turn(number)
        return False

    async def _turn(self, number: int) -> None:
        """Wait until a slot is given to request ``number``."""
        turn = self._turns[number] = asyncio.get_running_loop().create_future()
        await self._wait(turn)

    async def until(self, target: float) -> None:
        """Wait for the clock to reach ``target``."""
        loop = asyncio.get_running_loop()
        while (left := target - self.clock()) > 0:
            waiter = loop.create_future()
            self._sleepers.add(waiter)
            # Event loops count in milliseconds: rounding up spares a wake-up just before the time.
            timer = loop.call_later(math.ceil(min(left, MAX_TIMER_S) * 1e3) / 1e3, _wake, waiter)
            try:
                await self._wait(waiter)
            finally:
                timer.cancel()
                self._sleepers.discard(waiter)

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        if self._crashed:
            raise EngineCrashed
        await waiter


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Run:
    """One run. Await either :meth:`reply` (a plain answer) or iterate :meth:`events` (a stream), once.

    Cancelling either, or closing the iterator, aborts the run: its slot is free at once and the abort is counted. Both
    raise :class:`EngineCrashed` and :class:`ConnectionClosed` where such a failure was ordered.
    """

    def __init__(self, engine: EngineCore, work: Work) -> None:
        self._engine = engine
        self._work = work
        self._failure = work.failure
        self._pace = engine.pace
        self._limit = work.steps
        self._done = 0
        self._first_at = 0.0
        if self._failure is not None:
            if self._failure.kind is FailureKind.SLOW:
                self._pace = engine.pace.slowed(self._failure.delay_ms / 1e3)
                self._failure = None
            else:
                self._limit = min(work.steps, self._failure.after_tokens)

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return self._work.stream is not None

    @property
    def content_type(self) -> str:
        """Of an answer that succeeds."""
        return wire.EVENTS if self.streams else wire.JSON

    def finish_at_once(self) -> wire.Reply:
        """The whole answer of an engine that takes no time."""
        work, engine = self._work, self._engine
        cached = self._begin()
        engine.generated_tokens += work.steps * work.width
        engine.finished[work.finish] += 1
        if work.stream is None:
            return wire.Reply(200, wire.JSON, work.plain(cached))
        stream = work.stream
        body = stream.opening() + stream.tokens(0, work.steps) + stream.closing(work.usage(cached))
        return wire.Reply(200, wire.EVENTS, body)

    async def reply(self) -> wire.Reply:
        """The plain answer."""
        async with self._counted(), self._slot():
            cached = self._begin()
            await self._engine.until(self._first_at)
            while await self._advance(COUNT_INTERVAL_S) is not None:
                pass
            body = self._work.plain(cached)
            if self._failure is None:
                return wire.Reply(200, wire.JSON, body)
            if self._failure.kind is FailureKind.CLOSE_MIDSTREAM:
                raise ConnectionClosed(body[: len(body) // 2], len(body))
            if self._failure.kind is FailureKind.GARBAGE:
                return wire.Reply(200, wire.JSON, wire.GARBAGE)
            error = await self._error()
            return wire.Reply(self._failure.status, wire.JSON, error)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream, in pieces: what is due when the caller asks comes as one."""
        stream = self._work.stream
        if stream is None:
            raise ValueError("a plain answer has no events")
        async with self._counted(), self._slot():
            cached = self._begin()
            await self._engine.until(self._first_at)
            piece = stream.opening() if self._limit or self._failure is None else b""
            while (steps := await self._advance(0.0)) is not None:
                piece += stream.tokens(*steps)
                if steps[1] < self._work.steps or self._failure is not None:
                    yield piece
                    piece = b""
            if self._failure is None:
                yield piece + stream.closing(self._work.usage(cached))
                return
            if self._failure.kind is FailureKind.CLOSE_MIDSTREAM:
                raise ConnectionClosed
            if self._failure.kind is FailureKind.GARBAGE:
                yield wire.GARBAGE
                return
            error = await self._error()
            yield encode_event(error) + DONE_EVENT

    def _begin(self) -> int:
        """The request has its slot: from here its time counts. Returns the prompt tokens that the cache held."""
        engine, work = self._engine, self._work
        engine.prompt_tokens += work.prompt_tokens
        cached = work.admit()
        self._first_at = engine.prefill.first_token_at(self._pace, engine.clock(), work.prompt_tokens, cached)
        return cached

    async def _advance(self, min_wait_s: float) -> tuple[int, int] | None:
        """The next range of engine steps, once it is due; None at the limit. A wait lasts ``min_wait_s`` if the rest
        of the answer does."""
        engine, pace, start, limit = self._engine, self._pace, self._done, self._limit
        if start == limit:
            return None
        while True:
            while (due := pace.tokens_due(self._first_at, engine.clock(), limit)) == start:
                last_at = pace.token_at(self._first_at, limit - 1)
                await engine.until(max(pace.token_at(self._first_at, start), min(engine.clock() + min_wait_s, last_at)))
            if await engine.keeps_slot(self._work.number, self._tokens_at(due)):
                break
            self._first_at = pace.resumed_at(engine.clock(), self._tokens_at(start), start)
        engine.generated_tokens += (due - start) * self._work.width
        self._done = due
        return start, due

    def _slot(self) -> AbstractAsyncContextManager[None]:
        return self._engine.slot(self._work.number, self._work.prompt_tokens)

    def _tokens_at(self, done: int) -> int:
        """Tokens that the request has after ``done`` steps, prompt included."""
        return self._work.prompt_tokens + done * self._work.width

    async def _error(self) -> bytes:
        """Fail as ordered: by raising, by hanging, or with this error object."""
        failure = self._failure
        if failure is None or failure.kind is FailureKind.CRASH:
            raise EngineCrashed
        if failure.kind is FailureKind.HANG:
            await self._engine.until(self._engine.clock() + HANG_LIMIT_S)
            raise ConnectionClosed
        return wire.error_object("A failure that was ordered.", "InternalServerError", failure.status)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Count how the run ended; one that nobody waited for to its end was aborted."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self._engine.finished["abort"] += 1
            raise
        if self._failure is None:
            self._engine.finished[self._work.finish] += 1
