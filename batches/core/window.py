"""Match what arrives in a batch's reply stream to its open lines: frames to whole answers, markers to ended jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from queue_schemas import END, HEAD, Frame, JobId, Marker, MarkerKind

from .checkpoint import OpenLine
from .ids import job_of


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's whole answer to a line; ``generation`` is that of the job that it answers."""

    line: int
    generation: int
    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class EndedJob:
    """The queue ended a line's job without an answer; ``generation`` is that of the job."""

    line: int
    generation: int
    kind: MarkerKind
    reason: str


@dataclass(slots=True)
class _PartialAnswer:
    """An answer of which some frames have arrived. ``before``: the stream entry before that of its first frame."""

    before: str
    epoch: int
    attempt_id: str
    status: int
    content_type: str
    pieces: list[bytes] = field(default_factory=list)


MAX_EARLY = 4_096
MAX_EARLY_BYTES = 32 << 20


class JobWindow:
    """The jobs of the open lines, which are the window of the batch that is on the queue.

    An answer to another job may be for a line that is opened later: a step whose checkpoint was not saved has sent it.
    A bounded number of such early answers is kept (:meth:`early`); others are of lines that are done, or are sent
    again.
    """

    def __init__(self, batch_id: str, shard: int, lines: Mapping[int, OpenLine]) -> None:
        self._batch_id = batch_id
        self._shard = shard
        self._jobs: dict[JobId, tuple[int, int]] = {}
        self._partial: dict[JobId, _PartialAnswer] = {}
        self._early: dict[JobId, Frame] = {}
        self._early_bytes = 0
        for number, line in lines.items():
            for generation in range(line.generation + 1):
                self.add(number, generation)

    def add(self, line: int, generation: int) -> JobId:
        """Expect answers to a job of a line; the job's id."""
        job_id = job_of(self._batch_id, self._shard, line, generation)
        self._jobs[job_id] = (line, generation)
        return job_id

    def early(self, line: int) -> Answer | None:
        """Take the answer to a line that is being opened, if it has arrived already."""
        frame = self._early.pop(job_of(self._batch_id, self._shard, line, 0), None)
        if frame is None:
            return None
        self._early_bytes -= len(frame.data)
        return Answer(line, 0, frame.status, frame.content_type, frame.data)

    def remove(self, line: int, generation: int) -> None:
        """Expect no more answers to a line."""
        for number in range(generation + 1):
            job_id = job_of(self._batch_id, self._shard, line, number)
            self._jobs.pop(job_id, None)
            self._partial.pop(job_id, None)

    def receive(self, items: Iterable[Frame | Marker], before: str) -> list[Answer | EndedJob]:
        """The answers and ended jobs that one entry of the reply stream completes; ``before`` is the id of the entry
        before it."""
        found: list[Answer | EndedJob] = []
        for item in items:
            job = self._jobs.get(item.job_id)
            if job is None:
                self._keep_early(item)
                continue
            if isinstance(item, Marker):
                self._partial.pop(item.job_id, None)
                if item.kind in (MarkerKind.DEAD, MarkerKind.CANCELLED, MarkerKind.EXPIRED):
                    found.append(EndedJob(*job, item.kind, item.reason))
            elif (answer := self._complete(*job, item, before)) is not None:
                found.append(answer)
        return found

    def safe_to_trim(self, through: str) -> str:
        """The last entry up to ``through`` that may be removed: the entries of a partial answer stay until it is
        whole."""
        needed = [partial.before for partial in self._partial.values()]
        return min((*needed, through), key=entry_order)

    def _keep_early(self, item: Frame | Marker) -> None:
        if isinstance(item, Marker) or item.flags & (HEAD | END) != HEAD | END or item.job_id in self._early:
            return
        if len(self._early) < MAX_EARLY and self._early_bytes < MAX_EARLY_BYTES:
            self._early[item.job_id] = item
            self._early_bytes += len(item.data)

    def _complete(self, line: int, generation: int, frame: Frame, before: str) -> Answer | None:
        """The answer, if ``frame`` is its only or its last one."""
        if frame.flags & HEAD and frame.flags & END:
            return Answer(line, generation, frame.status, frame.content_type, frame.data)
        partial = self._partial.get(frame.job_id)
        if frame.flags & HEAD:
            if partial is None or frame.epoch >= partial.epoch:
                self._partial[frame.job_id] = _PartialAnswer(
                    before, frame.epoch, frame.attempt_id, frame.status, frame.content_type, [frame.data]
                )
            return None
        if partial is None or (frame.epoch, frame.attempt_id) != (partial.epoch, partial.attempt_id):
            return None
        if frame.seq != len(partial.pieces):
            return None  # a repeat; or a gap, after which the last frame does not complete it
        partial.pieces.append(frame.data)
        if not frame.flags & END:
            return None
        return Answer(line, generation, partial.status, partial.content_type, b"".join(partial.pieces))


def entry_order(entry_id: str) -> tuple[int, int]:
    """Sort key of stream entry ids."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
