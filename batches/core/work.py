"""Where a batch's work stands: what a step leaves for the next one, which may run in another process.

It may lag behind what was done since, never run ahead of it: chunks are written before it, and found again by their
numbers. It stays small however many lines there are: what is open at once is bounded.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel

from storage import BatchError, BatchProgress, BatchStatus, Part

MAX_ERRORS = 100
"""Told of one batch."""


class Phase(StrEnum):
    """What is done next."""

    READ = "read"
    """Each line by itself."""
    COMPARE = "compare"
    """The ids of all lines with each other."""
    PUMP = "pump"
    """Lines to jobs, answers to chunks."""
    MERGE = "merge"
    """Chunks to the output and error files."""
    REST = "rest"
    """Lines without an answer to the error file."""
    END = "end"
    """All is written but the end."""


class OpenLine(NamedTuple):
    """A line that was read and has no stored result. It lies at ``offset`` to ``end`` of the input. ``generation``
    counts its jobs from 0. ``sent_at`` is the Unix time at which the queue was last known to have the job; 0: it is to
    be sent."""

    offset: int
    end: int
    custom_id: str
    generation: int = 0
    sent_at: float = 0


class Merge(BaseModel):
    """How far the files are written. ``plan`` names the frozen list of chunks, and is part of the parts' names: two
    that merge at once do not mix. ``chunk`` is the next one; ``number`` and ``offset`` are the next line of the input
    that is looked at for the rest."""

    plan: str
    began_at: int
    chunk: int = 0
    steps: int = 0
    output: list[Part] = []
    errors: list[Part] = []
    completed: int = 0
    failed: int = 0
    usage: list[int] = []
    number: int = 1
    offset: int = 0


class Work(BaseModel):
    """All of it. ``number`` and ``offset`` are the next line of the input; ``outcome`` how the batch is to end."""

    progress: BatchProgress = BatchProgress()
    phase: Phase = Phase.READ
    number: int = 1
    offset: int = 0
    total: int = 0
    last_line: int = 0
    """The number behind that of the input's last line; known once all were read."""
    errors: list[BatchError] = []
    runs: list[str] = []
    slices: int = 0
    unknown_since: float = 0
    """When the model was first not known; 0: it was, or nobody asked."""
    read_all: bool = False
    open: dict[int, OpenLine] = {}
    ahead: set[int] = set()
    """Lines behind the next one whose result is stored already."""
    chunk: int = 0
    """Chunks with a lower number are accounted for."""
    answer_bytes: int = 0
    """The largest answer of late, fading; 0: none has come."""
    stored_at: float = 0
    run_id: str = ""
    """The run of Redis that has the open lines."""
    stopping_since: float = 0
    """When it was decided to hand out no more lines; 0: it was not."""
    outcome: BatchStatus | None = None
    merge: Merge | None = None

    def answered(self, size_bytes: int) -> None:
        """Note how large an answer was."""
        self.answer_bytes = max(size_bytes, self.answer_bytes - self.answer_bytes // 16)

    def publish(self, status: BatchStatus, **changes: object) -> None:
        """Change what the world sees."""
        self.progress = self.progress.model_copy(update={"status": status, **changes})

    def stamp(self, name: str, at_s: float) -> None:
        """Note when something first happened."""
        self.progress = self.progress.model_copy(update={"stamps": {name: int(at_s)} | self.progress.stamps})

    def fault(self, error: BatchError) -> None:
        """Something is wrong with the batch; of the most that are told the first count."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)

    @property
    def full_of_errors(self) -> bool:
        return len(self.errors) >= MAX_ERRORS
