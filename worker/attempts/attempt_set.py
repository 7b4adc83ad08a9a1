"""Attempts: run the leases that a worker session has claimed, one task each, and stop them when they must stop.

Every attempt ends in exactly one of three ways: settled with an answer, released to be run again, or dropped because
the queue has ended it already.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from queue_schemas import JobId, Lane, Lease, Pool, shard_of_job
from telemetry import get_logger, span_from, tracing_enabled

from ..core.slots import RETRY_APART_S
from ..engines import Engine, StepReader
from ..frame_batcher import FrameBatcher
from ..metrics import WorkerMetrics
from ..queue import Queue
from .answer_relay import AnswerRelay
from .attempt import Attempt, EngineDisconnected, Settle, StopReason, StreamTimeouts, Yield, log_fields
from .end_reports import EndReports
from .engine_disconnects import EngineDisconnects
from .runner import AttemptRunner
from .waiting import first, within

HAND_BACK_TIMEOUT_S = 5.0
_MAX_ABORTS_REMEMBERED = 4_096

log = get_logger(__name__)


class Attempts:
    """Runs leases on ``engine``; with ``preemption``, so that jobs that may yield can.

    ``other_worker_serves(pool)`` says whether another worker serves a model. ``ended(attempt, wait_s)`` is called when
    one is over, its slot free again: the job may come back after ``wait_s`` if its attempt was spent here, else that is
    None.
    """

    def __init__(
        self,
        engine: Engine,
        queue: Queue,
        frame_batcher: FrameBatcher,
        step_reader: StepReader,
        metrics: WorkerMetrics,
        *,
        max_answer_bytes: int,
        other_worker_serves: Callable[[Pool], Awaitable[bool]],
        preemption: bool,
        ended: Callable[[Attempt, float | None], None],
    ) -> None:
        self._metrics = metrics
        self._step_reader = step_reader
        self._ended = ended
        self._relay = AnswerRelay(queue, frame_batcher, step_reader, metrics, max_answer_bytes)
        self._runner = AttemptRunner(engine, queue, self._relay, metrics, other_worker_serves, preemption=preemption)
        self._reports = EndReports(queue, metrics)
        self._engine_disconnects = EngineDisconnects(engine, self._reports)
        # By attempt: a job that was released may come back here before the answer to its release was seen.
        self._running: dict[str, Attempt] = {}
        self._aborted: OrderedDict[JobId, None] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._model_idle: dict[str, asyncio.Event] = {}
        """Of models whose last attempt is waited for."""
        self._output_before = 0
        self._output_at = 0.0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def output_count(self) -> int:
        """Pieces of output that arrived from the engine so far: while it rises, the engine makes progress."""
        return self._relay.output_count

    def start(self, leases: Sequence[Lease], group: asyncio.TaskGroup) -> None:
        """Run each lease in a task of ``group``."""
        now = asyncio.get_running_loop().time()
        for lease in leases:
            attempt = Attempt(lease, now)
            job = lease.job
            self._metrics.started(lease)
            self._running[lease.attempt_id] = attempt
            self._idle.clear()
            if job.id in self._aborted:
                del self._aborted[job.id]
                attempt.stop_reason = StopReason.ENDED_BEFORE_START
            group.create_task(self._run(attempt))

    def has(self, attempt_id: str) -> bool:
        """Whether that attempt runs."""
        return attempt_id in self._running

    def abort(self, job_id: JobId, reason: str) -> None:
        """The queue has ended ``job_id``: close its engine connection. It may be a job whose claim is on its way."""
        self._aborted[job_id] = None
        if len(self._aborted) > _MAX_ABORTS_REMEMBERED:
            self._aborted.popitem(last=False)
        for attempt in list(self._running.values()):
            if attempt.lease.job.id == job_id:
                log.info("job_aborted", reason=reason, **log_fields(attempt.lease))
                attempt.stop(StopReason.JOB_ENDED)

    def running(self, attempt_id: str) -> Attempt | None:
        """That attempt, if it runs."""
        return self._running.get(attempt_id)

    def may_yield(self, model: Pool) -> list[Attempt]:
        """The attempts of a model whose jobs may yield, in the order in which they began. No suspect is among them."""
        running = self._running.values()
        return [one for one in running if one.may_yield and one.lease.job.model == model and not one.lease.suspect]

    def yield_slot(self, attempt: Attempt) -> None:
        """Stop an attempt for an interactive job. Its slot counts as free at once: by the time that the claim for it is
        answered, the engine's connection is closed."""
        attempt.stop(StopReason.YIELDS)
        attempt.has_slot = False
        self._ended(attempt, None)

    def by_lane(self) -> Counter[Lane]:
        """How many attempts of each lane run, those included that yield: their slots are for what waits already."""
        return Counter(attempt.lease.job.lane for attempt in self._running.values())

    def leases(self, shard: int) -> list[Lease]:
        """The leases of ``shard`` that run."""
        return [one.lease for one in self._running.values() if shard_of_job(one.lease.job.id) == shard]

    def drop(self, attempt_ids: Iterable[str]) -> None:
        """Stop attempts that the queue does not know, or whose jobs it gave to others: it refuses their answers."""
        for attempt_id in attempt_ids:
            if (attempt := self._running.get(attempt_id)) is not None:
                log.info("attempt_dropped", reason="the queue does not know it any more", **log_fields(attempt.lease))
                attempt.stop(StopReason.JOB_ENDED)

    def stop_late(self, now: float) -> None:
        """Stop every attempt whose deadline has passed."""
        for attempt in list(self._running.values()):
            if now >= attempt.deadline:
                attempt.stop(StopReason.DEADLINE)

    def stop_stalled(self, now: float, timeouts: StreamTimeouts) -> None:
        """Stop each stream that stands still while others go on."""
        if self._step_reader.is_flushing:
            return  # not checked is not counted
        if self.output_count != self._output_before:
            self._output_before, self._output_at = self.output_count, now
        for attempt in list(self._running.values()):
            stall = attempt.stall
            # The second look, with its own limit, comes only where the first has found something.
            if stall.is_stalled(now, self._output_at, timeouts.text_s) and stall.is_stalled(
                now, self._output_at, attempt.idle_timeout_s(timeouts)
            ):
                attempt.stop(StopReason.STREAM_STALLED)

    async def finish(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """Wait until nothing runs. What still does after ``timeout_s``, or once ``hurry`` is set, is handed back."""
        if not await within(first(self.idle(), hurry.wait()), timeout_s) or self._running:
            log.warning("jobs_handed_back", jobs=len(self._running))
            self.hand_back()
            await within(self.idle(), HAND_BACK_TIMEOUT_S)

    async def finish_model(self, model: str, timeout_s: float, hurry: asyncio.Event) -> None:
        """:meth:`finish` for the attempts of one model."""
        if not self._of_model(model):
            return
        idle = self._model_idle[model] = asyncio.Event()
        try:
            if not await within(first(idle.wait(), hurry.wait()), timeout_s) or self._of_model(model):
                running = self._of_model(model)
                log.warning("jobs_handed_back", jobs=len(running), model=model)
                for attempt in running:
                    attempt.stop(StopReason.WORKER_STOPS)
                await within(idle.wait(), HAND_BACK_TIMEOUT_S)
        finally:
            del self._model_idle[model]

    def _of_model(self, model: str) -> list[Attempt]:
        return [attempt for attempt in self._running.values() if attempt.lease.job.model == model]

    def hand_back(self) -> None:
        """Stop all attempts; their jobs go to other workers as if they had not been started."""
        for attempt in list(self._running.values()):
            attempt.stop(StopReason.WORKER_STOPS)

    async def idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    async def _run(self, attempt: Attempt) -> None:
        lease = attempt.lease
        job = lease.job
        attempt.task = asyncio.current_task()
        wait_s: float | None = None
        attributes: dict[str, str | int | float | bool] | None = None
        if tracing_enabled():
            attributes = {"job": job.id, "model": job.model, "attempt": lease.attempt}
        try:
            with span_from(job.traceparent, "attempt", attributes) as span:
                ending = await self._runner.run(attempt)
                attempt.ending = True
                if isinstance(ending, Settle):
                    await self._reports.settle(attempt, ending)
                elif isinstance(ending, Yield):
                    await self._reports.yielded(attempt, ending)
                elif isinstance(ending, EngineDisconnected):
                    wait_s = RETRY_APART_S
                    span.fail(ending.reason)
                    await self._engine_disconnects.end(attempt, ending, self._running.values())
                elif ending is not None:
                    wait_s = ending.wait_s if ending.counted else None
                    span.fail(ending.reason)
                    await self._reports.release(attempt, ending)
        finally:
            if attempt.sender is not None:
                attempt.sender.discard()
                attempt.sender = None  # it calls the attempt back: they would keep each other, and the job's body
            self._running.pop(lease.attempt_id, None)
            if not self._running:
                self._idle.set()
            if self._model_idle and job.model in self._model_idle and not self._of_model(job.model):
                self._model_idle[job.model].set()
            if attempt.has_slot:
                self._ended(attempt, wait_s)
