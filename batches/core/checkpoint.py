"""The progress of a batch between its steps: what one step saves and the next one, maybe in another process, loads.

A checkpoint may lag behind the chunks of results that are stored, never run ahead of them: chunks are written first,
and found again by their numbers. Its size does not grow with the batch: the number of open lines is bounded.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel

from scheduling.batch_urgency import UrgencyState
from storage import BatchError, BatchProgress, BatchStatus, Part

MAX_ERRORS = 100
"""Errors that are reported of one batch."""


class Phase(StrEnum):
    """What the next step does."""

    READ = "read"
    """Check each line by itself."""
    COMPARE_IDS = "compare_ids"
    """Look for ids that two lines share."""
    DISPATCH = "dispatch"
    """Put lines on the queue as jobs, and store their answers in chunks."""
    MERGE = "merge"
    """Merge the chunks into the output and error files."""
    UNANSWERED = "unanswered"
    """Add the lines without an answer to the error file."""
    END = "end"
    """Publish the files and end the batch."""


class OpenLine(NamedTuple):
    """A line that was read and has no stored result.

    It is at bytes ``offset`` to ``end`` of the input. ``generation`` counts its jobs from 0. ``sent_at`` is the Unix
    time at which the queue was last known to have the job; 0: it is to be sent.
    """

    offset: int
    end: int
    custom_id: str
    generation: int = 0
    sent_at: float = 0


class MergeState(BaseModel):
    """How far the files are written.

    ``plan`` names the frozen list of chunks and is part of the names of the parts: two processes that merge at the same
    time do not mix. ``chunk`` is the next chunk. ``next_line`` is the number of the next line of
    the input to check for an answer, and ``next_offset`` its byte.
    """

    plan: str
    began_at: int
    chunk: int = 0
    steps: int = 0
    output: list[Part] = []
    errors: list[Part] = []
    completed: int = 0
    failed: int = 0
    usage: list[int] = []
    next_line: int = 1
    next_offset: int = 0


class Checkpoint(BaseModel):
    """All of it. ``next_line`` is the number of the next line of the input, and ``next_offset`` its byte. ``outcome``
    is how the batch is to end."""

    progress: BatchProgress = BatchProgress()
    phase: Phase = Phase.READ
    next_line: int = 1
    next_offset: int = 0
    total: int = 0
    cost: int = 0
    """What all lines will cost, by an estimate (:mod:`scheduling.cost`)."""
    end_line: int = 0
    """One more than the number of the input's last line; known once all lines were read."""
    errors: list[BatchError] = []
    id_runs: list[str] = []
    """Names of the sorted runs of ids (:mod:`.duplicate_ids`)."""
    compared_slices: int = 0
    unknown_since: float = 0
    """When a step first found the model unknown; 0: it is known, or was not checked yet."""
    late_since: float = 0
    """When a step first found that the batch cannot end in time; 0: none did."""
    read_all: bool = False
    open: dict[int, OpenLine] = {}
    out_of_order: set[int] = set()
    """Lines from ``next_line`` on that have a stored result already."""
    chunk: int = 0
    """All chunks with a lower number are accounted for."""
    answer_bytes: int = 0
    """A decaying maximum of the sizes of recent answers; 0: none has come."""
    stored_at: float = 0
    urgency: UrgencyState = UrgencyState()
    rated_at: float = 0
    """When the urgency was last decided; 0: not yet."""
    server_run_id: str = ""
    """Run id of the Redis server that has the jobs of the open lines."""
    stopping_since: float = 0
    """When the batch stopped sending lines to end early; 0: it did not."""
    outcome: BatchStatus | None = None
    merge: MergeState | None = None

    def note_answer(self, size_bytes: int) -> None:
        """Account for the size of an answer."""
        self.answer_bytes = max(size_bytes, self.answer_bytes - self.answer_bytes // 16)

    def publish(self, status: BatchStatus, **changes: object) -> None:
        """Set the batch's status, and other fields of its public progress."""
        self.progress = self.progress.model_copy(update={"status": status, **changes})

    def stamp(self, name: str, at_s: float) -> None:
        """Record the time of a first event; later calls change nothing."""
        self.progress = self.progress.model_copy(update={"stamps": {name: int(at_s)} | self.progress.stamps})

    def add_error(self, error: BatchError) -> None:
        """Record an error of the batch, up to ``MAX_ERRORS``."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)

    @property
    def remaining(self) -> int:
        """Lines without a stored result."""
        return self.total - self.progress.completed - self.progress.failed

    @property
    def full_of_errors(self) -> bool:
        return len(self.errors) >= MAX_ERRORS
