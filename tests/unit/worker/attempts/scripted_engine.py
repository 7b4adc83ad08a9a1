"""Run attempts on a scripted engine and record the calls that they make."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from broker import Broker, Undelivered
from queue_schemas import (
    BrokerUnavailable,
    EngineState,
    Frame,
    Job,
    Lease,
    Outcome,
    Settled,
    unpack_frames,
)
from telemetry import MetricsRegistry
from tests.support.queue import make_job
from worker.attempts import Attempt, Attempts
from worker.engines import EngineAnswer, EngineCall, StepReader
from worker.engines.dialects import VLLM
from worker.frame_batcher import FrameBatcher
from worker.metrics import WorkerMetrics

SSE = "text/event-stream; charset=utf-8"


ATTEMPT_IDS = itertools.count()


class Answer:
    """An answer made of pieces; an exception among them is raised, an event is waited for. ``in_steps``: it may be read
    with other streams once its first piece was taken."""

    headers: Mapping[str, str] = {}

    def __init__(
        self, status: int, content_type: str, pieces: list[Any], *, delimited: bool = True, in_steps: bool = False
    ) -> None:
        self.delimited = delimited
        self.retry_after_s: float | None = None
        self.status = status
        self.content_type = content_type
        self._pieces = pieces
        self._unread = iter(pieces)
        self._in_steps = in_steps

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        self._unread = iter(self._pieces)
        async for piece in self._rest():
            yield piece

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        if self._in_steps:
            async for piece in self._rest():
                take(piece)
        return self._in_steps

    async def _rest(self) -> AsyncGenerator[bytes, None]:
        for piece in self._unread:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, asyncio.Event):
                await piece.wait()
            else:
                yield piece

    async def read(self, limit_bytes: int) -> bytes:
        return b"".join([piece async for piece in self.chunks()])


class ScriptedEngine:
    """Answers every call with ``answer``; counts the calls that were left before their end."""

    dialect = VLLM

    def __init__(self, answer: Answer | Exception) -> None:
        self.answer = answer
        self.calls: list[EngineCall] = []
        self.left_early = 0
        self.state, self.detail, self.models = EngineState.READY, "", ("m",)

    async def run(self, changed: Callable[[], None]) -> None: ...

    @asynccontextmanager
    async def call(self, call: EngineCall) -> AsyncIterator[EngineAnswer]:
        self.calls.append(call)
        if isinstance(self.answer, Exception):
            raise self.answer
        try:
            yield self.answer
        except asyncio.CancelledError:
            self.left_early += 1
            raise

    async def progress(self) -> int | None:
        return 0

    async def stop(self, limit_s: float) -> None: ...


class RecordingBroker:
    """Takes what attempts end with."""

    def __init__(self) -> None:
        self.attempts = self.output = self
        self.settled: list[tuple[Lease, Outcome, list[Frame]]] = []
        self.figures: list[dict[str, int | None]] = []
        """What each of these is said to have used, and for how long it had its slot."""
        self.released: list[tuple[str, bool]] = []
        self.yields: list[Job | None] = []
        self.declined: list[bool] = []
        self.crashes: list[list[Lease]] = []
        self.published: list[Frame] = []
        self.appended: list[Frame] = []
        self.append_answer = Settled.OK
        self.kept: list[Frame] = []
        self.unreadable = False
        self.gone: set[str] = set()
        self.avoided_ms = 0
        self.failures = 0
        self.released_by = asyncio.Event()
        self.released_by.set()

    async def settle(self, lease: Lease, outcome: Outcome, frames: bytes = b"", **figures: int | None) -> Settled:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.settled.append((lease, outcome, unpack_frames(frames)))
        self.figures.append(figures)
        return Settled.OK

    async def release(self, lease: Lease, reason: str, *, counted: bool, avoid_ms: int) -> Settled:
        self.avoided_ms = avoid_ms
        await self.released_by.wait()
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.released.append((reason, counted))
        return Settled.OK

    async def decline_to_yield(self, lease: Lease, *, for_now: bool, region: str) -> None:
        assert region == "eu"
        self.declined.append(for_now)

    async def release_yielded(self, lease: Lease, reason: str, following: Job | None) -> Settled:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.yields.append(following)
        return Settled.OK

    async def report_crash(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("away")
        self.crashes.append(list(leases))
        return [Settled.OK] * len(leases)

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        self.appended += unpack_frames(frames)
        return self.append_answer

    async def frames(self, job_id: str) -> AsyncIterator[Frame]:
        """What earlier attempts said."""
        if self.unreadable:
            raise BrokerUnavailable("away")
        for frame in self.kept:
            yield frame

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> dict[str, Undelivered]:
        for packed in frames.values():
            self.published += unpack_frames(packed)
        return dict.fromkeys(self.gone & frames.keys(), Undelivered.GONE)


class Bench:
    """Attempts on a scripted engine, with everything around them."""

    def __init__(self, answer: Answer | Exception, *, max_answer_bytes: int = 10_000) -> None:
        self.engine = ScriptedEngine(answer)
        self.broker = RecordingBroker()
        self.elsewhere = True
        self.ended: list[bool] = []
        self.waits_s: list[float | None] = []
        self.frame_batcher = FrameBatcher(
            self.broker.attempts.publish, self.broker.attempts.append, interval_ms=0, limit_bytes=10_000
        )
        self.metrics = WorkerMetrics(MetricsRegistry("worker"))
        self.attempts = Attempts(
            self.engine,
            cast(Broker, self.broker),
            self.frame_batcher,
            StepReader(self.frame_batcher.flush, max_wait_s=0),
            self.metrics,
            max_answer_bytes=max_answer_bytes,
            other_worker_serves=self._elsewhere,
            preemption=True,
            ended=self._end,
        )

    async def _elsewhere(self, _pool: str) -> bool:
        return self.elsewhere

    def _end(self, _attempt: Attempt, wait_s: float | None) -> None:
        self.ended.append(wait_s is not None)
        self.waits_s.append(wait_s)

    @asynccontextmanager
    async def running(self, *leases: Lease) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            flusher = group.create_task(self.frame_batcher.run())
            self.attempts.start(leases, group)
            try:
                yield
                await asyncio.wait_for(self.attempts.idle(), 10)
            finally:
                flusher.cancel()

    async def run(self, *leases: Lease) -> None:
        async with self.running(*leases):
            pass


def lease(attempt: int = 1, remaining_ms: int = 60_000, **fields: Any) -> Lease:
    job: Job = make_job(reply_to="router.0123456789abcdef", request_id="req_1", **fields)
    return Lease(job, 1, f"attempt-{next(ATTEMPT_IDS)}", attempt, remaining_ms, 5)


def plain(status: int, body: bytes = b"{}") -> Answer:
    return Answer(status, "application/json", [body])
