"""Decide how urgent a batch is while its lines are dispatched, and move those that wait when it becomes more urgent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker import Broker
from queue_schemas import State
from scheduling.batch_urgency import BatchNeed, Urgency, next_state, place_of
from storage import Batch
from telemetry import get_logger

from ..context import BatchContext
from ..core import Checkpoint, JobWindow
from .open_lines import OpenLines

_INTERVAL_S = 1.0
_MAX_ELAPSED_S = 60.0
"""A longer time without a decision counts as so much: nobody read the answers then."""

log = get_logger(__name__)


class UrgencyTracker:
    """The urgency of one batch, for one step. ``answered``: lines that were answered since it was last decided."""

    def __init__(
        self,
        context: BatchContext,
        batch: Batch,
        checkpoint: Checkpoint,
        window: JobWindow,
        lines: OpenLines,
        broker: Broker,
        others: Sequence[BatchNeed],
    ) -> None:
        self._context = context
        self._batch = batch
        self._checkpoint = checkpoint
        self._window = window
        self._lines = lines
        self._broker = broker
        self._others = others
        self.answered = 0

    async def update(self) -> None:
        """Decide again, once a second."""
        checkpoint, now_s = self._checkpoint, self._context.now_s()
        elapsed_s = now_s - (checkpoint.rated_at or now_s - _INTERVAL_S)
        if 0 <= elapsed_s < _INTERVAL_S:
            return
        checkpoint.rated_at = now_s
        before, remaining = checkpoint.urgency.urgency, checkpoint.remaining - len(self._lines.results)
        checkpoint.urgency = next_state(
            checkpoint.urgency,
            self._others,
            answered=self.answered,
            elapsed_s=min(max(elapsed_s, 0.0), _MAX_ELAPSED_S),
            remaining=max(remaining, 0),
            deadline_s=self._batch.request.expires_at,
            now_s=now_s,
        )
        self.answered = 0
        urgency = checkpoint.urgency.urgency
        if urgency is not before:
            log.info("batch_urgency", batch=self._batch.request.id, urgency=urgency.name.lower(), lines_left=remaining)
        if urgency > before:
            await self._move(before, urgency)

    async def _move(self, before: Urgency, urgency: Urgency) -> None:
        """Take lines that wait off the queue, to send them again where they are earlier. What runs is left alone, and
        so are lines that have used up half their tries: each job of a line counts as one."""
        most = self._context.settings.max_busy_tries // 2
        moved = [
            number
            for number, line in self._checkpoint.open.items()
            if line.sent_at
            and line.generation < most
            and number not in self._lines.results
            and place_of(before, number) != place_of(urgency, number)
        ]
        await asyncio.gather(*map(self._take_back, moved))

    async def _take_back(self, number: int) -> None:
        line = self._checkpoint.open[number]
        job_id = self._window.add(number, line.generation)
        # One whose cancellation was confirmed by a repeated call only is sent again when its marker is read.
        if await self._broker.jobs.cancel(job_id, "its batch is more urgent now", if_queued=True) is State.QUEUED:
            self._checkpoint.open[number] = line._replace(generation=line.generation + 1, sent_at=0)
            self._window.add(number, line.generation + 1)
