"""Run the lines of a batch: send them to the queue as jobs, read their answers, store results in chunks.

A step may stop anywhere. An answer stays in the batch's reply stream until the chunk that holds it is stored. A line's
job id is made from batch and line, so that sending a line twice runs it once. Chunks have unique names and list their
lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from broker import Broker
from queue_schemas import Frame, MarkerKind, Pool
from scheduling.batch_urgency import BatchNeed
from storage import Batch, BatchStatus
from telemetry import get_logger
from telemetry.backoff import Backoff
from telemetry.threads import in_thread

from ..context import BatchContext
from ..core import (
    Answer,
    Checkpoint,
    EndedJob,
    JobWindow,
    OpenLine,
    Phase,
    answered,
    reply_stream_of,
    request_of,
    unanswered,
)
from .input import InputDeleted, input_deleted
from .line_sender import PAUSE_S, LineSender
from .open_lines import OpenLines
from .run_folder import RunFolder
from .urgency import UrgencyTracker

MAX_GENERATIONS = 100
"""Jobs of one line whose answer was lost before the line fails."""
_BUSY = frozenset({429, 502, 503, 504})
"""Statuses of engines that may take the line later."""
_MAX_BUSY_S = 60.0
_FIRST_MESSAGES, _MAX_MESSAGES = 16, 128
_READ_BYTES = 8 << 20
"""How much to read from the reply stream in one call, roughly: an answer may have megabytes."""
_BLOCK_MS, _SHARED_BLOCK_MS = 200, 40
_IDLE_S = 0.5
"""Pause of a batch that has nothing to do while others wait: together they would never rest."""

log = get_logger(__name__)


class BatchDispatcher:
    """One step of one batch. ``others``: what the other batches of its model with short slack need."""

    def __init__(
        self,
        context: BatchContext,
        batch: Batch,
        folder: RunFolder,
        checkpoint: Checkpoint,
        others: Sequence[BatchNeed] = (),
    ) -> None:
        self._context = context
        self._settings = context.settings
        self._batch = batch
        self._checkpoint = checkpoint
        self._broker: Broker = context.queue()
        model = Pool(checkpoint.progress.model or "")
        self._shard = self._broker.shard_of(model)
        self._reply_stream = reply_stream_of(batch.request.id)
        self._window = JobWindow(batch.request.id, self._shard, checkpoint.open)
        self._lines = OpenLines(context, folder, checkpoint, self._window)
        self._sender = LineSender(
            context, batch, checkpoint, self._window, self._lines, self._broker, model, self._reply_stream
        )
        self._busy_backoff = Backoff(self._settings.busy_backoff_ms / 1000, _MAX_BUSY_S, jitter=0)
        self._urgency = UrgencyTracker(context, batch, checkpoint, self._window, self._lines, self._broker, others)
        self._last_entry = "0"
        self._caught_up = False
        self._read_count = max(1, min(_FIRST_MESSAGES, _READ_BYTES // max(checkpoint.answer_bytes, 1)))
        self._active = False
        """Whether anything was sent or received since the last read."""

    async def run(self, until_s: float, *, shared: bool) -> float:
        """Go on until ``until_s`` (monotonic), or until there is nothing to do while other batches wait (``shared``).

        Returns the seconds to wait before the next step.
        """
        await in_thread(self._lines.recover_chunks)
        await self._open_reply_stream()
        await self._sender.start()
        try:
            return await self._go_on(until_s, shared=shared)
        finally:
            await self._sender.close()
            self._context.metrics.in_flight.set(self._lines.in_flight)

    async def _go_on(self, until_s: float, *, shared: bool) -> float:
        checkpoint, lines, sender, tick = self._checkpoint, self._lines, self._sender, self._context.tick_s
        idle = paused = False
        while True:
            await self._read(idle, shared=shared, until_s=until_s)
            self._resend_unconfirmed()
            await self._urgency.update()
            ending = self._decide_outcome()
            # Lines are opened first: some may have been answered already. They are sent once there is room for answers.
            if ending is None and self._caught_up:
                await self._with_input(lambda: in_thread(lambda: sender.open_lines(self._handle)))
            if lines.chunk_is_due:
                await self._store()
            if ending is None and self._caught_up and not paused:
                await self._with_input(self._send_due)
            elif ending is not None and self._context.now_s() >= checkpoint.stopping_since + self._grace_s(ending):
                await self._stop_early()
                return 0
            if self._caught_up and not lines.in_flight and (ending is not None or checkpoint.read_all):
                await self._store()
                if not checkpoint.open:
                    checkpoint.outcome = ending or BatchStatus.COMPLETED
                    checkpoint.phase = Phase.MERGE
                    return 0
            paused = sender.is_paused
            if paused and not lines.in_flight:
                return PAUSE_S
            idle = self._caught_up and (paused or not lines.has_room)
            if sender.unconfirmed:
                continue  # one more read shows whether their answers are there
            if shared and idle and not self._active:
                return _IDLE_S
            if tick() >= until_s or self._context.stopping:
                return 0

    # Outcome

    def _decide_outcome(self) -> BatchStatus | None:
        """How the batch is to end early, if it is."""
        checkpoint = self._checkpoint
        if checkpoint.outcome is None and self._batch.cancel_asked_at is not None:
            self._stop(BatchStatus.CANCELLED)
            checkpoint.publish(BatchStatus.CANCELLING)
            checkpoint.stamp("cancelling_at", self._batch.cancel_asked_at)
        elif checkpoint.outcome is None and self._context.now_s() >= self._batch.request.expires_at:
            self._stop(BatchStatus.EXPIRED)
        return checkpoint.outcome

    def _stop(self, outcome: BatchStatus) -> None:
        self._checkpoint.outcome = outcome
        self._checkpoint.stopping_since = self._context.now_s()
        log.info("batch_stopping", batch=self._batch.request.id, outcome=outcome.value, in_flight=self._lines.in_flight)

    def _grace_s(self, outcome: BatchStatus) -> float:
        return 0 if outcome is BatchStatus.EXPIRED else self._settings.cancel_grace_ms / 1000

    # Answers

    async def _open_reply_stream(self) -> None:
        """Make sure that answers can arrive, and send open lines again if Redis may have lost some of their jobs."""
        checkpoint = self._checkpoint
        checkpoint.stored_at = checkpoint.stored_at or self._context.now_s()
        replies = self._broker.durable_replies
        created = await replies.open(self._shard, self._reply_stream, self._settings.reply_ttl_ms)
        server_run_id = await replies.server_run_id(self._shard)
        if checkpoint.open and (created or server_run_id != checkpoint.server_run_id):
            log.warning(
                "batch_sends_again", batch=self._batch.request.id, lines=len(checkpoint.open), replies_lost=created
            )
            checkpoint.open = {number: line._replace(sent_at=0) for number, line in checkpoint.open.items()}
        checkpoint.server_run_id = server_run_id

    async def _read(self, idle: bool, *, shared: bool, until_s: float) -> None:
        """Receive what has come; if there is nothing else to do (``idle``), wait for it a while."""
        longest_ms = _SHARED_BLOCK_MS if shared else _BLOCK_MS
        block_ms = max(1, min(longest_ms, int((until_s - self._context.tick_s()) * 1000))) if idle else 1
        count = self._read_count
        messages = await self._broker.durable_replies.read(
            self._shard, self._reply_stream, self._last_entry, block_ms, count
        )
        self._active = False
        for message in messages:
            for item in self._window.receive(message.content, self._last_entry):
                self._handle(item)
            self._last_entry = message.entry_id
        self._caught_up = len(messages) < count
        if messages:
            size = sum(len(item.data) for message in messages for item in message.content if isinstance(item, Frame))
            self._read_count = max(1, min(_MAX_MESSAGES, 2 * count, _READ_BYTES * len(messages) // max(size, 1)))

    def _handle(self, item: Answer | EndedJob) -> None:
        """An answer becomes the line's result; a line that was not answered for good is sent again."""
        line = self._checkpoint.open.get(item.line)
        if line is None or item.line in self._lines.results:
            return
        self._active = True
        request_id = request_of(self._batch.request.id, item.line)
        if self._checkpoint.outcome is None and isinstance(item, Answer) and item.status in _BUSY:
            if item.generation < line.generation:
                return  # the line was sent again since
            if line.generation + 1 < self._settings.max_busy_tries:
                self._resend(item.line, line, pause_s=self._busy_backoff.pause_s(line.generation + 1))
                return
        if isinstance(item, Answer):
            result = answered(item.line, request_id, line.custom_id, item.status, item.content_type, item.body)
        elif item.kind is MarkerKind.DEAD:
            message = f"all attempts of the line failed: {item.reason}"
            result = unanswered(item.line, request_id, line.custom_id, "attempts_exhausted", message)
        elif self._checkpoint.outcome is None and item.kind is MarkerKind.CANCELLED:
            if item.generation == line.generation:
                self._resend(item.line, line)  # the queue cancelled it while there was no reply stream
            return
        else:
            return  # the batch ends early: all such lines get the same result later
        self._sender.unconfirmed.pop(item.line, None)
        self._lines.add_result(result)
        self._urgency.answered += 1

    def _resend_unconfirmed(self) -> None:
        """Send lines again, as new jobs, whose job has ended and whose answer is not in the reply stream."""
        if not self._caught_up:
            return
        for number in list(self._sender.unconfirmed):
            del self._sender.unconfirmed[number]
            if number in self._checkpoint.open and number not in self._lines.results:
                self._resend(number, self._checkpoint.open[number])

    def _resend(self, number: int, line: OpenLine, *, pause_s: float = 0) -> None:
        """Send a line again as a new job, after a pause; after ``MAX_GENERATIONS`` jobs it fails."""
        if line.generation + 1 >= MAX_GENERATIONS:
            request_id = request_of(self._batch.request.id, number)
            message = "the line's answer was lost too often; ask an operator to look at the queue's Redis"
            self._sender.unconfirmed.pop(number, None)
            self._lines.add_result(unanswered(number, request_id, line.custom_id, "answer_lost", message))
            return
        self._context.metrics.sent_again.inc()
        # Lines are sent once ``resend_after_ms`` have passed since ``sent_at``: a pause is the rest of that time.
        sent_at = self._context.now_s() - self._settings.resend_after_ms / 1000 + pause_s if pause_s else 0
        self._checkpoint.open[number] = line._replace(generation=line.generation + 1, sent_at=sent_at)
        self._window.add(number, line.generation + 1)

    # Sending and storing

    async def _with_input(self, read: Callable[[], Awaitable[None]]) -> None:
        """Do what reads the input file. If it was deleted, the batch fails."""
        try:
            await read()
        except InputDeleted:
            if self._checkpoint.outcome is None:
                self._stop(BatchStatus.FAILED)
                self._checkpoint.add_error(input_deleted(self._batch))

    async def _send_due(self) -> None:
        if await self._sender.send_due():
            self._active = True
        if self._sender.unconfirmed:
            self._caught_up = False  # their answers may have come since the last read

    async def _store(self) -> None:
        """Store the results, and only then remove their answers from Redis."""
        if await self._lines.store() and self._last_entry != "0":
            through = self._window.safe_to_trim(self._last_entry)
            if through != "0":
                await self._broker.durable_replies.trim(self._shard, self._reply_stream, through)

    async def _stop_early(self) -> None:
        """Cancel the jobs of all lines without a result, and store what had finished by then."""
        left = [number for number in self._checkpoint.open if number not in self._lines.results]
        jobs = [self._window.add(number, self._checkpoint.open[number].generation) for number in left]
        await asyncio.gather(*(self._broker.jobs.cancel(job_id, "its batch ends") for job_id in jobs))
        self._caught_up = False
        while not self._caught_up:
            await self._read(idle=False, shared=False, until_s=self._context.tick_s())
        await self._store()
        self._checkpoint.open = {}
        self._checkpoint.phase = Phase.MERGE
