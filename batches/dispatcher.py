"""The middle steps of a batch: lines to jobs, answers to chunks.

What makes it safe to stop anywhere: an answer stays in the batch's reply stream until the chunk that holds it is
stored; a line is sent under an id made from batch and line, so that sending it twice is sending it once; chunks have
names of their own, and which lines they hold stands in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from broker import Broker
from queue_schemas import (
    TERMINAL,
    BrokerFull,
    Frame,
    Job,
    JobId,
    Lane,
    MarkerKind,
    OverCapacity,
    Pool,
    State,
    Tenant,
)
from storage import Batch, BatchStatus, FileRecord
from telemetry import get_logger
from telemetry.threads import in_thread

from .context import BatchContext, Folder, chunk_number, input_of
from .core import (
    Answer,
    Ended,
    OpenLine,
    Phase,
    RawLine,
    Result,
    Window,
    Work,
    answered,
    id_and_body,
    reply_stream_of,
    request_of,
    unanswered,
)
from .input import InputGone, InputLines, read_range
from .validate import input_deleted

MAX_GENERATIONS = 100
"""Jobs of one line whose answer was lost; then the line failed."""
_BUSY = frozenset({429, 502, 503, 504})
"""What an engine answers that will take the line later."""
_MAX_BUSY_MS = 60_000
_FIRST_LETTERS, _MAX_LETTERS = 16, 128
_BYTES_READ = 8 << 20
"""How much is read from the reply stream at once, roughly: an answer may have megabytes."""
_FIRST_LINES = 64
"""Handed out before an answer has come, which tells how large they are: that of a short line may have megabytes."""
_ANSWER_BYTES = 128 << 20
"""How much the answers of a batch may take in Redis, should all that are expected come at once."""
_BLOCK_MS = 200
_SHARED_BLOCK_MS = 40
_HOLD_S = 1.0
"""How long nothing is sent after the queue had no room."""
_IDLE_S = 0.5
"""How long a batch is left alone, at least, that has nothing to do while others wait: together they would not rest."""
_FIRST_CHUNK_S, _CHUNKS_PER_AGE = 2.0, 20
"""Results are stored after 2 s, or a twentieth of the batch's age, and ``chunk_ms`` at the latest."""

log = get_logger(__name__)


class BatchDispatcher:
    """One step of one batch."""

    def __init__(self, context: BatchContext, batch: Batch, folder: Folder, work: Work) -> None:
        self._context = context
        self._settings = context.settings
        self._batch = batch
        self._folder = folder
        self._work = work
        self._broker: Broker = context.queue()
        self._model = Pool(work.progress.model or "")
        self._shard = self._broker.shard_of(self._model)
        self._mailbox = reply_stream_of(batch.request.id)
        self._window = Window(batch.request.id, self._shard, work.open)
        self._results: dict[int, Result] = {}
        self._result_bytes = 0
        self._in_flight_bytes = 0
        self._bodies: dict[int, bytes] = {}
        """Of lines that were read and are not sent yet."""
        self._unheard: dict[int, JobId] = {}
        """Lines whose job the queue says has ended, though no answer was read yet."""
        self._last = "0"
        self._caught_up = False
        self._letters = max(1, min(_FIRST_LETTERS, _BYTES_READ // max(work.answer_bytes, 1)))
        self._hold_until = 0.0
        self._input: FileRecord | None = None
        self._lines: InputLines | None = None
        self.moved = False
        """Whether anything was sent or heard."""

    async def run(self, until_s: float, *, shared: bool) -> float:
        """Go on until ``until_s`` (monotonic), sooner if there is nothing to do and other batches wait (``shared``).
        The seconds after which to go on."""
        await in_thread(self._account_for_chunks)
        self._in_flight_bytes = sum(line.end - line.offset for line in self._work.open.values())
        await self._open()
        self._input = await in_thread(lambda: input_of(self._context.files, self._batch))
        try:
            return await self._go_on(until_s, shared=shared)
        finally:
            if self._lines is not None:
                await in_thread(self._lines.close)
            self._context.metrics.in_flight.set(self._in_flight)

    async def _go_on(self, until_s: float, *, shared: bool) -> float:
        work, tick = self._work, self._context.tick_s
        quiet = held = False
        while True:
            await self._read(quiet, shared=shared, until_s=until_s)
            self._look_at_unheard()
            ending = self._decided()
            # Lines are opened first: some may have been answered already. They are sent once there is room for answers.
            if ending is None and self._caught_up:
                await self._with_input(lambda: in_thread(self._open_lines))
            if self._is_full or (self._results and self._is_stale):
                await self._store()
            if ending is None and self._caught_up and not held:
                await self._with_input(self._send_due)
            elif ending is not None and self._context.now_s() >= work.stopping_since + self._grace_s(ending):
                await self._give_up()
                return 0
            if self._caught_up and not self._in_flight and (ending is not None or work.read_all):
                await self._store()
                if not work.open:
                    work.outcome = ending or BatchStatus.COMPLETED
                    work.phase = Phase.MERGE
                    return 0
            held = tick() < self._hold_until
            if held and not self._in_flight:
                return _HOLD_S
            quiet = self._caught_up and (held or not self._room)
            if self._unheard:
                continue  # whether their answers are there is a question of one more look
            if shared and quiet and not self.moved:
                return _IDLE_S
            if tick() >= until_s or self._context.stopping:
                return 0

    # What is known

    @property
    def _in_flight(self) -> int:
        return len(self._work.open) - len(self._results)

    @property
    def _room(self) -> bool:
        """Whether more lines may be handed out."""
        work, settings = self._work, self._settings
        return (
            not work.read_all
            and work.outcome is None
            and self._in_flight < min(settings.window_lines, self._max_answers)
            and self._in_flight_bytes < settings.window_bytes
        )

    @property
    def _max_answers(self) -> int:
        """How many answers there is room for in Redis, by the size of those that have come."""
        size = self._work.answer_bytes
        return max(1, _ANSWER_BYTES // size) if size else _FIRST_LINES

    @property
    def _is_full(self) -> bool:
        return len(self._results) >= self._settings.chunk_lines or self._result_bytes >= self._settings.chunk_bytes

    @property
    def _is_stale(self) -> bool:
        """Whether results are kept back for too long. Early in a batch its owner wants to see it move; later there must
        not be too many chunks."""
        now_s = self._context.now_s()
        age_s = now_s - self._work.progress.stamps.get("in_progress_at", now_s)
        limit_s = min(self._settings.chunk_ms / 1000, max(_FIRST_CHUNK_S, age_s / _CHUNKS_PER_AGE))
        return now_s - self._work.stored_at >= limit_s

    def _decided(self) -> BatchStatus | None:
        """How the batch is to end early, if it is."""
        work = self._work
        if work.outcome is None and self._batch.cancel_asked_at is not None:
            self._stop(BatchStatus.CANCELLED)
            work.publish(BatchStatus.CANCELLING)
            work.stamp("cancelling_at", self._batch.cancel_asked_at)
        elif work.outcome is None and self._context.now_s() >= self._batch.request.expires_at:
            self._stop(BatchStatus.EXPIRED)
        return work.outcome

    def _stop(self, outcome: BatchStatus) -> None:
        self._work.outcome = outcome
        self._work.stopping_since = self._context.now_s()
        log.info("batch_stops", batch=self._batch.request.id, outcome=outcome.value, in_flight=self._in_flight)

    def _grace_s(self, outcome: BatchStatus) -> float:
        return 0 if outcome is BatchStatus.EXPIRED else self._settings.cancel_grace_ms / 1000

    # Beginning

    def _account_for_chunks(self) -> None:
        """Chunks that were stored after the work was saved last."""
        for name in self._folder.chunks(self._work.chunk):
            done = []
            for result in self._folder.chunk(name):
                if result.line in self._work.open:
                    self._window.forget(result.line, self._work.open.pop(result.line).generation)
                    done.append(result)
                elif result.line >= self._work.number and result.line not in self._work.ahead:
                    self._work.ahead.add(result.line)
                    done.append(result)
            self._work.chunk = chunk_number(name) + 1
            self._count(done)

    async def _open(self) -> None:
        """Make sure that answers can arrive, and find out whether Redis may have lost some of what it was given."""
        work = self._work
        work.stored_at = work.stored_at or self._context.now_s()
        made = await self._broker.durable_replies.open(self._shard, self._mailbox, self._settings.reply_ttl_ms)
        run_id = await self._broker.durable_replies.server_run_id(self._shard)
        if work.open and (made or run_id != work.run_id):
            log.warning("batch_asks_again", batch=self._batch.request.id, lines=len(work.open), mailbox_lost=made)
            work.open = {number: line._replace(sent_at=0) for number, line in work.open.items()}
        work.run_id = run_id

    # Answers

    async def _read(self, quiet: bool, *, shared: bool, until_s: float) -> None:
        """Take in what has come; if there is nothing else to do (``quiet``), wait for it a while."""
        longest = _SHARED_BLOCK_MS if shared else _BLOCK_MS
        block_ms = max(1, min(longest, int((until_s - self._context.tick_s()) * 1000))) if quiet else 1
        count = self._letters
        letters = await self._broker.durable_replies.read(self._shard, self._mailbox, self._last, block_ms, count)
        self.moved = False
        for letter in letters:
            for item in self._window.take(letter.news, self._last):
                self._take(item)
            self._last = letter.entry_id
        self._caught_up = len(letters) < count
        if letters:
            size = sum(len(item.data) for letter in letters for item in letter.news if isinstance(item, Frame))
            self._letters = max(1, min(_MAX_LETTERS, 2 * count, _BYTES_READ * len(letters) // max(size, 1)))

    def _take(self, item: Answer | Ended) -> None:
        line = self._work.open.get(item.line)
        if line is None or item.line in self._results:
            return
        self.moved = True
        request_id = request_of(self._batch.request.id, item.line)
        if self._work.outcome is None and _asks_again(item):
            if item.generation < line.generation:
                return  # it was sent again since
            if line.generation + 1 < self._settings.max_busy_tries:
                self._again(item.line, line, pause_s=self._busy_pause_s(line.generation))
                return
        if isinstance(item, Answer):
            answer = answered(item.line, request_id, line.custom_id, item.status, item.content_type, item.body)
        elif item.kind is MarkerKind.DEAD:
            message = f"the line was given up: {item.reason}"
            answer = unanswered(item.line, request_id, line.custom_id, "attempts_exhausted", message)
        elif self._work.outcome is None and item.kind is MarkerKind.CANCELLED:
            if item.generation == line.generation:
                self._again(item.line, line)  # by the queue, while no reply stream was there: nobody wanted it
            return
        else:
            return  # as the batch ends: what becomes of it is said of all such lines at once
        self._keep(answer, line)

    def _keep(self, result: Result, line: OpenLine) -> None:
        """A line has a result, which is to be stored."""
        self._results[result.line] = result
        self._work.answered(len(result.text))
        self._result_bytes += len(result.text)
        self._in_flight_bytes -= line.end - line.offset
        self._unheard.pop(result.line, None)

    def _look_at_unheard(self) -> None:
        """Jobs that had ended when they were sent again, and whose answer is not in the reply stream, read since."""
        if not self._caught_up:
            return
        for number in list(self._unheard):
            del self._unheard[number]
            if number in self._work.open and number not in self._results:
                self._again(number, self._work.open[number])

    def _busy_pause_s(self, tries: int) -> float:
        doubled: int = self._settings.busy_backoff_ms << min(tries, 16)
        return min(doubled, _MAX_BUSY_MS) / 1000

    def _again(self, number: int, line: OpenLine, *, pause_s: float = 0) -> None:
        """A line has no answer that counts: it runs once more, as another job, after a pause."""
        if line.generation + 1 >= MAX_GENERATIONS:
            request_id = request_of(self._batch.request.id, number)
            sentence = "the line's answer was lost too often; ask an operator to look at the queue's Redis"
            self._keep(unanswered(number, request_id, line.custom_id, "answer_lost", sentence), line)
            return
        self._context.metrics.sent_again.inc()
        # What was silent for long is sent: a pause is the rest of such a silence.
        sent_at = self._context.now_s() - self._settings.resend_after_ms / 1000 + pause_s if pause_s else 0
        self._work.open[number] = line._replace(generation=line.generation + 1, sent_at=sent_at)
        self._window.add(number, line.generation + 1)

    # Lines

    async def _with_input(self, read: Callable[[], Awaitable[None]]) -> None:
        """Do what reads the input file, which may have been deleted."""
        try:
            await read()
        except InputGone:
            if self._work.outcome is None:
                self._stop(BatchStatus.FAILED)
                self._work.fault(input_deleted(self._batch))

    async def _send_due(self) -> None:
        """Send what is new, and what was silent for long."""
        long_ago = self._context.now_s() - self._settings.resend_after_ms / 1000
        due = [
            number
            for number, line in self._work.open.items()
            if line.sent_at < long_ago and number not in self._results and number not in self._unheard
        ]
        if due:
            await in_thread(lambda: self._read_bodies(due))
            await self._send(due)

    def _open_lines(self) -> None:
        """Open as many new lines as there is room for."""
        work, settings = self._work, self._settings
        while self._room:
            if self._input is None:
                raise InputGone
            if self._lines is None:
                self._lines = InputLines(
                    self._context.files, self._input, settings.max_line_bytes, number=work.number, offset=work.offset
                )
            raw = self._lines.next()
            if raw is None:
                work.read_all = True
                return
            work.number, work.offset = raw.number + 1, raw.end
            early = self._window.early(raw.number)
            if raw.number in work.ahead:
                work.ahead.discard(raw.number)
                continue
            custom_id, self._bodies[raw.number] = _parse(raw)
            work.open[raw.number] = OpenLine(raw.offset, raw.end, custom_id)
            self._in_flight_bytes += raw.end - raw.offset
            self._window.add(raw.number, 0)
            if early is not None:
                self._take(early)

    def _read_bodies(self, numbers: Sequence[int]) -> None:
        """The bodies of lines that are to be sent again."""
        for number in numbers:
            if number not in self._bodies:
                if self._input is None:
                    raise InputGone
                line = self._work.open[number]
                data = read_range(self._context.files, self._input, line.offset, line.end)
                _, self._bodies[number] = _parse(RawLine(number, line.offset, line.end, data))

    async def _send(self, numbers: Sequence[int]) -> None:
        answers = await asyncio.gather(*map(self._send_one, numbers), return_exceptions=True)
        refused: OverCapacity | BrokerFull | None = None
        for number, answer in zip(numbers, answers, strict=True):
            self._bodies.pop(number, None)
            if isinstance(answer, OverCapacity | BrokerFull):
                refused = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                job_id, state = answer
                self.moved = True
                over = state in TERMINAL
                sent_at = 0 if over else self._context.now_s()
                self._work.open[number] = self._work.open[number]._replace(sent_at=sent_at)
                if over:
                    self._unheard[number] = job_id
                    self._caught_up = False
        if refused is not None:
            log.info("batch_waits_for_room", batch=self._batch.request.id, why=refused.message)
            self._hold_until = self._context.tick_s() + _HOLD_S

    async def _send_one(self, number: int) -> tuple[JobId, State]:
        request = self._batch.request
        job = Job(
            id=self._window.add(number, self._work.open[number].generation),
            tenant=Tenant(request.tenant),
            model=self._model,
            path=request.endpoint,
            body=self._bodies[number],
            lane=Lane.BATCH,
            ttl_ms=max(1, int((request.expires_at - self._context.now_s()) * 1000)),
            max_attempts=self._settings.max_attempts,
            reply_to=self._mailbox,
            request_id=request_of(request.id, number),
        )
        return job.id, await self._broker.jobs.enqueue(job)

    # Storing

    async def _store(self) -> None:
        """Store what has come, and only then let go of it in Redis."""
        work = self._work
        work.stored_at = self._context.now_s()
        if not self._results:
            return
        results = list(self._results.values())
        await in_thread(lambda: self._folder.put_chunk(work.chunk, results))
        work.chunk += 1
        for result in results:
            self._window.forget(result.line, work.open.pop(result.line).generation)
        self._count(results)
        self._results.clear()
        self._result_bytes = 0
        if self._last != "0":
            through = self._window.safe_to_drop(self._last)
            if through != "0":
                await self._broker.durable_replies.trim(self._shard, self._mailbox, through)

    def _count(self, results: Sequence[Result]) -> None:
        completed = sum(result.ok for result in results)
        progress = self._work.progress
        self._work.publish(
            progress.status,
            completed=progress.completed + completed,
            failed=progress.failed + len(results) - completed,
        )
        self._context.metrics.lines(completed, len(results) - completed)

    async def _give_up(self) -> None:
        """Take what is left from the queue, and keep what had finished by then."""
        left = [number for number in self._work.open if number not in self._results]
        jobs = [self._window.add(number, self._work.open[number].generation) for number in left]
        await asyncio.gather(*(self._broker.jobs.cancel(job_id, "its batch ends") for job_id in jobs))
        self._caught_up = False
        while not self._caught_up:
            await self._read(quiet=False, shared=False, until_s=self._context.tick_s())
        await self._store()
        self._work.open = {}
        self._work.phase = Phase.MERGE


def _asks_again(item: Answer | Ended) -> bool:
    """Whether an engine, or what stands before it, says that it is too busy, or not there yet."""
    return isinstance(item, Answer) and item.status in _BUSY


def _parse(raw: RawLine) -> tuple[str, bytes]:
    """The id of a line, and what its engine gets. It was validated before."""
    if raw.data is None:
        raise InputGone
    return id_and_body(raw.data.strip().removeprefix(b"\xef\xbb\xbf"))
