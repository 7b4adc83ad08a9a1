"""Account for the open lines of a batch: those on the queue, and those whose result waits to be stored in a chunk."""

from __future__ import annotations

from collections.abc import Sequence

from telemetry.threads import in_thread

from ..context import BatchContext
from ..core import Checkpoint, JobWindow, OpenLine, RawLine, Result
from .run_folder import RunFolder, chunk_number

_FIRST_LINES = 64
"""Lines to send before an answer shows how large they are: the answer to a short line may have megabytes."""
_ANSWER_BYTES = 128 << 20
"""How much the answers of a batch may take in Redis if all that are expected come at the same time."""
_FIRST_CHUNK_S, _CHUNKS_PER_AGE = 2.0, 20
"""Results are stored after 2 s, or a twentieth of the batch's age, and ``chunk_ms`` at the latest."""


class OpenLines:
    """The open lines of the checkpoint. ``results`` are those that are not stored yet, by line."""

    def __init__(self, context: BatchContext, folder: RunFolder, checkpoint: Checkpoint, window: JobWindow) -> None:
        self._context = context
        self._settings = context.settings
        self._folder = folder
        self._checkpoint = checkpoint
        self._window = window
        self.results: dict[int, Result] = {}
        self._result_bytes = 0
        self._in_flight_bytes = sum(line.end - line.offset for line in checkpoint.open.values())

    @property
    def in_flight(self) -> int:
        """How many lines have no result."""
        return len(self._checkpoint.open) - len(self.results)

    @property
    def has_room(self) -> bool:
        """Whether another line may be opened."""
        checkpoint, settings = self._checkpoint, self._settings
        return (
            not checkpoint.read_all
            and checkpoint.outcome is None
            and self.in_flight < min(settings.window_lines, self._max_answers)
            and self._in_flight_bytes < settings.window_bytes
        )

    @property
    def chunk_is_due(self) -> bool:
        """Whether to store the results now: there are enough, or they have waited long enough."""
        settings = self._settings
        if len(self.results) >= settings.chunk_lines or self._result_bytes >= settings.chunk_bytes:
            return True
        return bool(self.results) and self._waited_long_enough

    def open(self, raw: RawLine, custom_id: str) -> None:
        """Open a line of the input."""
        self._checkpoint.open[raw.number] = OpenLine(raw.offset, raw.end, custom_id)
        self._in_flight_bytes += raw.end - raw.offset
        self._window.add(raw.number, 0)

    def add_result(self, result: Result) -> None:
        """An open line has its result."""
        line = self._checkpoint.open[result.line]
        self.results[result.line] = result
        self._checkpoint.note_answer(len(result.text))
        self._result_bytes += len(result.text)
        self._in_flight_bytes -= line.end - line.offset

    async def store(self) -> bool:
        """Store the results as a chunk and close their lines; whether there were any."""
        checkpoint = self._checkpoint
        checkpoint.stored_at = self._context.now_s()
        if not self.results:
            return False
        results = list(self.results.values())
        await in_thread(lambda: self._folder.put_chunk(checkpoint.chunk, results))
        checkpoint.chunk += 1
        for result in results:
            self._window.remove(result.line, checkpoint.open.pop(result.line).generation)
        self._count(results)
        self.results.clear()
        self._result_bytes = 0
        return True

    def recover_chunks(self) -> None:
        """Account for chunks that were stored after the checkpoint was saved. Blocks."""
        checkpoint = self._checkpoint
        for name in self._folder.chunks(checkpoint.chunk):
            done = []
            for result in self._folder.chunk(name):
                if result.line in checkpoint.open:
                    line = checkpoint.open.pop(result.line)
                    self._in_flight_bytes -= line.end - line.offset
                    self._window.remove(result.line, line.generation)
                    done.append(result)
                elif result.line >= checkpoint.next_line and result.line not in checkpoint.out_of_order:
                    checkpoint.out_of_order.add(result.line)
                    done.append(result)
            checkpoint.chunk = chunk_number(name) + 1
            self._count(done)

    @property
    def _max_answers(self) -> int:
        """How many answers there is room for in Redis, by the size of recent ones."""
        size = self._checkpoint.answer_bytes
        return max(1, _ANSWER_BYTES // size) if size else _FIRST_LINES

    @property
    def _waited_long_enough(self) -> bool:
        """Early in a batch its owner wants to see progress; later there must not be too many chunks."""
        now_s = self._context.now_s()
        age_s = now_s - self._checkpoint.progress.stamps.get("in_progress_at", now_s)
        limit_s = min(self._settings.chunk_ms / 1000, max(_FIRST_CHUNK_S, age_s / _CHUNKS_PER_AGE))
        return now_s - self._checkpoint.stored_at >= limit_s

    def _count(self, results: Sequence[Result]) -> None:
        completed = sum(result.ok for result in results)
        progress = self._checkpoint.progress
        self._checkpoint.publish(
            progress.status,
            completed=progress.completed + completed,
            failed=progress.failed + len(results) - completed,
        )
        self._context.metrics.lines(completed, len(results) - completed)
