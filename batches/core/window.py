"""The lines that are on the queue: which line a job is of, and what its frames and markers come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from queue_schemas import END, HEAD, Frame, JobId, Marker, MarkerKind

from .ids import job_of
from .work import OpenLine


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's whole answer to a line; ``generation`` is that of the job which it answers."""

    line: int
    generation: int
    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The queue ended a line's job without an answer; ``generation`` is the job's."""

    line: int
    generation: int
    kind: MarkerKind
    reason: str


@dataclass(slots=True)
class _Parts:
    """An answer that comes in pieces. ``before``: the entry that came before its first."""

    before: str
    epoch: int
    attempt_id: str
    status: int
    content_type: str
    pieces: list[bytes] = field(default_factory=list)


MAX_EARLY = 4_096
MAX_EARLY_BYTES = 32 << 20


class Window:
    """Knows the jobs of the open lines.

    An answer to none of them may be one to a line that is opened later: a step that was not saved has sent it. A number
    of such answers is kept at hand (:meth:`early`); the others are of lines that are done, or come again.
    """

    def __init__(self, batch_id: str, shard: int, lines: Mapping[int, OpenLine]) -> None:
        self._batch_id = batch_id
        self._shard = shard
        self._jobs: dict[JobId, tuple[int, int]] = {}
        self._parts: dict[JobId, _Parts] = {}
        self._early: dict[JobId, Frame] = {}
        self._early_bytes = 0
        for number, line in lines.items():
            for generation in range(line.generation + 1):
                self.add(number, generation)

    def add(self, line: int, generation: int) -> JobId:
        """A job of a line is to be known; its id."""
        job_id = job_of(self._batch_id, self._shard, line, generation)
        self._jobs[job_id] = (line, generation)
        return job_id

    def early(self, line: int) -> Answer | None:
        """The answer to a line that is opened now, if it has come already."""
        frame = self._early.pop(job_of(self._batch_id, self._shard, line, 0), None)
        if frame is None:
            return None
        self._early_bytes -= len(frame.data)
        return Answer(line, 0, frame.status, frame.content_type, frame.data)

    def forget(self, line: int, generation: int) -> None:
        """A line is done."""
        for number in range(generation + 1):
            job_id = job_of(self._batch_id, self._shard, line, number)
            self._jobs.pop(job_id, None)
            self._parts.pop(job_id, None)

    def take(self, news: Iterable[Frame | Marker], before: str) -> list[Answer | Ended]:
        """What one entry of the reply stream brings to an end; ``before`` is the id of the entry before it."""
        found: list[Answer | Ended] = []
        for item in news:
            job = self._jobs.get(item.job_id)
            if job is None:
                self._keep_early(item)
                continue
            if isinstance(item, Marker):
                self._parts.pop(item.job_id, None)
                if item.kind in (MarkerKind.DEAD, MarkerKind.CANCELLED, MarkerKind.EXPIRED):
                    found.append(Ended(*job, item.kind, item.reason))
            elif (answer := self._whole(*job, item, before)) is not None:
                found.append(answer)
        return found

    def _keep_early(self, item: Frame | Marker) -> None:
        if isinstance(item, Marker) or item.flags & (HEAD | END) != HEAD | END or item.job_id in self._early:
            return
        if len(self._early) < MAX_EARLY and self._early_bytes < MAX_EARLY_BYTES:
            self._early[item.job_id] = item
            self._early_bytes += len(item.data)

    def safe_to_drop(self, through: str) -> str:
        """The last entry up to ``through`` that is not needed any more: of an answer that comes in pieces none is to be
        dropped before the last has come."""
        kept = [parts.before for parts in self._parts.values()]
        return min((*kept, through), key=entry_order)

    def _whole(self, line: int, generation: int, frame: Frame, before: str) -> Answer | None:
        if frame.flags & HEAD and frame.flags & END:
            return Answer(line, generation, frame.status, frame.content_type, frame.data)
        parts = self._parts.get(frame.job_id)
        if frame.flags & HEAD:
            if parts is None or frame.epoch >= parts.epoch:
                parts = _Parts(before, frame.epoch, frame.attempt_id, frame.status, frame.content_type, [frame.data])
                self._parts[frame.job_id] = parts
            return None
        if parts is None or (frame.epoch, frame.attempt_id) != (parts.epoch, parts.attempt_id):
            return None
        if frame.seq != len(parts.pieces):
            return None  # a repeat; or a gap, after which the end is not its end either
        parts.pieces.append(frame.data)
        if not frame.flags & END:
            return None
        return Answer(line, generation, parts.status, parts.content_type, b"".join(parts.pieces))


def entry_order(entry_id: str) -> tuple[int, int]:
    """By what entries of a stream are in order."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
