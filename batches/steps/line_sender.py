"""Read the lines of a batch's input file and put them on the queue as jobs, for the batch dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from broker import Broker
from queue_schemas import TERMINAL, BrokerFull, Job, JobId, OverCapacity, Pool, SessionId, State, Tenant
from scheduling.batch_urgency import place_of
from storage import Batch, FileRecord
from telemetry import get_logger
from telemetry.threads import in_thread

from ..context import BatchContext
from ..core import Answer, Checkpoint, JobWindow, LineRequest, RawLine, request_in, request_of
from .input import InputDeleted, InputLines, input_of, read_range
from .open_lines import OpenLines

PAUSE_S = 1.0
"""How long nothing is sent after the queue had no room."""

log = get_logger(__name__)


class LineSender:
    """One step's reader and sender. ``unconfirmed`` are lines whose job the queue says has ended, though its answer was
    not read yet."""

    def __init__(
        self,
        context: BatchContext,
        batch: Batch,
        checkpoint: Checkpoint,
        window: JobWindow,
        lines: OpenLines,
        broker: Broker,
        model: Pool,
        reply_stream: SessionId,
    ) -> None:
        self._context = context
        self._settings = context.settings
        self._batch = batch
        self._checkpoint = checkpoint
        self._window = window
        self._lines = lines
        self._broker = broker
        self._model = model
        self._reply_stream = reply_stream
        self._input: FileRecord | None = None
        self._reader: InputLines | None = None
        self._requests: dict[int, LineRequest] = {}
        """Requests of lines that were read and are not sent yet."""
        self._weight = self._settings.weight_of(batch.request.tenant)
        self._paused_until = 0.0
        self.unconfirmed: dict[int, JobId] = {}

    async def start(self) -> None:
        """Find the input file."""
        self._input = await in_thread(lambda: input_of(self._context.files, self._batch))

    async def close(self) -> None:
        if self._reader is not None:
            await in_thread(self._reader.close)

    @property
    def is_paused(self) -> bool:
        """Whether the queue had no room a moment ago."""
        return self._context.tick_s() < self._paused_until

    def open_lines(self, on_early: Callable[[Answer], None]) -> None:
        """Open as many new lines as there is room for; ``on_early`` is called for answers that have come already.

        Blocks. Raises ``InputDeleted``.
        """
        checkpoint = self._checkpoint
        while self._lines.has_room:
            if self._input is None:
                raise InputDeleted
            if self._reader is None:
                self._reader = InputLines(
                    self._context.files,
                    self._input,
                    self._settings.max_line_bytes,
                    number=checkpoint.next_line,
                    offset=checkpoint.next_offset,
                )
            raw = self._reader.next()
            if raw is None:
                checkpoint.read_all = True
                return
            checkpoint.next_line, checkpoint.next_offset = raw.number + 1, raw.end
            early = self._window.early(raw.number)
            if raw.number in checkpoint.out_of_order:
                checkpoint.out_of_order.discard(raw.number)
                continue
            request = self._requests[raw.number] = self._parse(raw)
            self._lines.open(raw, request.custom_id)
            if early is not None:
                on_early(early)

    async def send_due(self) -> bool:
        """Send new lines, and again those without an answer for long; whether any was sent. Raises ``InputDeleted``."""
        resend_before = self._context.now_s() - self._settings.resend_after_ms / 1000
        due = [
            number
            for number, line in self._checkpoint.open.items()
            if line.sent_at < resend_before and number not in self._lines.results and number not in self.unconfirmed
        ]
        if not due:
            return False
        await in_thread(lambda: self._read_requests(due))
        return await self._send(due)

    def _read_requests(self, numbers: Sequence[int]) -> None:
        """Read the lines that are sent again."""
        for number in numbers:
            if number not in self._requests:
                if self._input is None:
                    raise InputDeleted
                line = self._checkpoint.open[number]
                data = read_range(self._context.files, self._input, line.offset, line.end)
                self._requests[number] = self._parse(RawLine(number, line.offset, line.end, data))

    async def _send(self, numbers: Sequence[int]) -> bool:
        answers = await asyncio.gather(*map(self._send_one, numbers), return_exceptions=True)
        refused: OverCapacity | BrokerFull | None = None
        sent = False
        for number, answer in zip(numbers, answers, strict=True):
            self._requests.pop(number, None)
            if isinstance(answer, OverCapacity | BrokerFull):
                refused = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                job_id, state = answer
                sent = True
                ended = state in TERMINAL
                sent_at = 0 if ended else self._context.now_s()
                self._checkpoint.open[number] = self._checkpoint.open[number]._replace(sent_at=sent_at)
                if ended:
                    self.unconfirmed[number] = job_id
        if refused is not None:
            log.info("batch_waits_for_room", batch=self._batch.request.id, reason=refused.message)
            self._paused_until = self._context.tick_s() + PAUSE_S
        return sent

    async def _send_one(self, number: int) -> tuple[JobId, State]:
        request, line = self._batch.request, self._requests[number]
        lane, band = place_of(self._checkpoint.urgency.urgency, number)
        job = Job(
            id=self._window.add(number, self._checkpoint.open[number].generation),
            tenant=Tenant(request.tenant),
            model=self._model,
            path=request.endpoint,
            body=line.body,
            lane=lane,
            band=band,
            ttl_ms=max(1, int((request.expires_at - self._context.now_s()) * 1000)),
            max_attempts=self._settings.max_attempts,
            reply_to=self._reply_stream,
            request_id=request_of(request.id, number),
            cost_estimate=line.cost,
            affinity=line.affinity,
            weight=self._weight,
            yields=self._settings.max_yields if line.may_yield else 0,
        )
        return job.id, await self._broker.jobs.enqueue(job)

    def _parse(self, raw: RawLine) -> LineRequest:
        """The request of a line, which was validated before."""
        if raw.data is None:
            raise InputDeleted
        data = raw.data.strip().removeprefix(b"\xef\xbb\xbf")
        return request_in(data, self._batch.request.tenant, self._model)
