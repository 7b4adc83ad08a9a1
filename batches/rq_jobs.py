"""Steps of batches as RQ jobs: the one queue of steps, and which batches have a step that waits, runs or pauses.

Nothing here is needed to recover: the sweep puts lost steps back from the file store. Keys beside RQ's own:
``rq:inferq:lock:<batch>`` (a step runs), ``rq:inferq:pause:<batch>`` (no step before it expires),
``rq:inferq:failures:<batch>`` (steps that failed in a row), ``rq:inferq:needs:<model>`` (what batches with short slack
need, by batch). All expire. All calls block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import isfinite

from broker.rq.handler import JobHandler
from broker.rq.queues import LOCK, RqConnection, RqJob, RqQueue
from queue_schemas import Tenant
from scheduling.batch_urgency import BatchNeed

BATCHES_QUEUE = "inferq-batches"
STEP_LIMIT_S = 60.0
"""A step is cancelled after so long."""
PAUSE, FAILURES = "pause", "failures"
"""Kinds of keys in RQ's Redis."""
_FAILURES_TTL_S = 3_600
_NEEDS = "needs"
_NEEDS_TTL_S = 60
"""A need that was told longer ago is that of a batch that ended, or whose batcher died."""

step_jobs = JobHandler(
    "steps of batches are run by `inferq batcher` (python -m batches.service), not by `rq worker`",
    limit_s=STEP_LIMIT_S + 30,
)


def advance(tenant: str, batch_id: str) -> str:
    """The function of a step's job; what it did, for people. Blocks."""
    return step_jobs.call(tenant, batch_id)


class StepJob(RqJob):
    """One step of a batch."""

    runs = "batches.rq_jobs.advance"


class StepQueue(RqQueue):
    """The steps that wait."""

    def __init__(self, connection: RqConnection) -> None:
        super().__init__(connection, BATCHES_QUEUE, StepJob)

    def put(self, tenant: Tenant, batch_id: str, what: str, number: int) -> None:
        """Enqueue the next step of a batch. ``number`` makes the job's id unique; ``what`` describes it for people."""
        self.enqueue(f"{batch_id}-{number}", f"{what} ({batch_id} of {tenant})", tenant, batch_id)

    def waiting(self) -> set[str]:
        """Batches whose next step is on the queue."""
        return {job_id.rpartition("-")[0] for job_id in self.waiting_ids()}

    def busy(self, batch_ids: Sequence[str]) -> set[str]:
        """Those of ``batch_ids`` with a step that runs or a pause."""
        return self.find_marked((LOCK, PAUSE), batch_ids)

    def pause(self, batch_id: str, pause_ms: int) -> None:
        """Run no step of a batch for a while."""
        self.mark(PAUSE, batch_id, pause_ms)

    def count_failure(self, batch_id: str) -> int:
        """Count a failed step; how many have failed in a row."""
        return self.count(FAILURES, batch_id, _FAILURES_TTL_S)

    def tell_need(self, model: str, batch_id: str, need: BatchNeed | None, now_s: float) -> None:
        """Tell the other batches of a model what one with short slack needs; None: it has none, or needs nothing."""
        if need is None:
            self.forget_told(_NEEDS, model, [batch_id])
            return
        fields = [need.deadline_s, need.remaining, need.rate, need.load, int(need.hopeless), now_s]
        self.tell(_NEEDS, model, batch_id, json.dumps(fields), _NEEDS_TTL_S)

    def other_needs(self, model: str, batch_id: str, now_s: float) -> list[BatchNeed]:
        """What the other batches of a model with short slack need. Those told too long ago are removed."""
        told = {other: _read_need(text, now_s) for other, text in self.told(_NEEDS, model).items()}
        self.forget_told(_NEEDS, model, [other for other, need in told.items() if need is None])
        return [need for other, need in told.items() if need is not None and other != batch_id]

    def forget(self, batch_ids: Iterable[str], *kinds: str) -> None:
        """Remove the keys of these ``kinds`` (``PAUSE``, ``FAILURES``)."""
        self.remove_marks(kinds, batch_ids)


def _read_need(text: str, now_s: float) -> BatchNeed | None:
    """None for what is too old, or was not written here."""
    try:
        deadline_s, remaining, rate, load, hopeless, told_at = map(float, json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = (deadline_s, remaining, rate, load)
    if not all(isfinite(number) and number >= 0 for number in numbers) or not abs(now_s - told_at) < _NEEDS_TTL_S:
        return None
    return BatchNeed(deadline_s, int(remaining), rate, load, hopeless != 0)
