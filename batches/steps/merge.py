"""Merge the chunks of a batch into the parts of its output and error files: the last steps of a batch.

What a step writes depends only on what it reads, not on the time, so that repeating it writes the same parts. Each plan
(a frozen list of chunks) has parts of its own.
"""

from __future__ import annotations

import secrets

import orjson

from queue_schemas import Tenant
from storage import Batch, BatchStatus, FileRecord, Part
from telemetry.threads import in_thread

from ..context import BatchContext
from ..core import (
    USAGE,
    BadLine,
    Checkpoint,
    LineBitmap,
    MergedLines,
    MergeState,
    Phase,
    file_of,
    read_line,
    request_of,
    unanswered,
)
from .input import InputDeleted, InputLines, input_of
from .run_folder import RunFolder

_STEP_CHUNKS = 64
_STEP_LINES = 20_000
_WRITE_LINES = 256
_UNANSWERED = {
    BatchStatus.EXPIRED: ("batch_expired", "this line was not answered before the batch's completion window ended"),
    BatchStatus.COMPLETED: ("answer_lost", "the line's answer is missing in the file store; send it in another batch"),
}
"""Error code and message of lines without a result, by how the batch ends; other batches say nothing of them."""


async def merge(context: BatchContext, batch: Batch, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Run one step."""
    if checkpoint.merge is None:
        await in_thread(lambda: _plan(context, folder, checkpoint))
    elif checkpoint.phase is Phase.MERGE:
        await in_thread(lambda: _merge_chunks(context, batch, folder, checkpoint))
    elif checkpoint.phase is Phase.UNANSWERED:
        await in_thread(lambda: _add_unanswered(context, batch, folder, checkpoint))


def _plan(context: BatchContext, folder: RunFolder, checkpoint: Checkpoint) -> None:
    plan = secrets.token_hex(6)
    context.store.put(folder.name("plans", plan), "\n".join(folder.chunks()).encode())
    checkpoint.merge = MergeState(plan=plan, began_at=int(context.now_s()), usage=[0] * len(USAGE))
    if checkpoint.outcome is not BatchStatus.CANCELLED:
        checkpoint.publish(BatchStatus.FINALIZING)
    checkpoint.stamp("finalizing_at", context.now_s())


def _merge_chunks(context: BatchContext, batch: Batch, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Merge the next chunks, until a part has its size."""
    state = checkpoint.merge
    assert state is not None  # noqa: S101 - made by _plan
    names = [name for name in (context.store.get(folder.name("plans", state.plan)) or b"").decode().split("\n") if name]
    lines = _merged_lines(context, folder, checkpoint, state)
    enough = context.settings.min_part_bytes
    last = min(len(names), state.chunk + _STEP_CHUNKS)
    at = state.chunk
    while at < last and lines.output_bytes < enough and lines.error_bytes < enough:
        lines.add(folder.chunk(names[at]))
        at += 1
    _write(context, batch, folder, state, lines)
    state.chunk = at
    if at == len(names):
        complete = state.completed + state.failed >= checkpoint.total
        checkpoint.phase = Phase.END if complete or checkpoint.outcome not in _UNANSWERED else Phase.UNANSWERED


def _add_unanswered(context: BatchContext, batch: Batch, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Add the next lines of the input that have no result to the error file."""
    state = checkpoint.merge
    assert state is not None and checkpoint.outcome is not None  # noqa: S101 - made by _plan; the phase has an outcome
    code, message = _UNANSWERED[checkpoint.outcome]
    found = input_of(context.files, batch)
    if found is None:
        checkpoint.phase = Phase.END
        return
    lines = _merged_lines(context, folder, checkpoint, state)
    settings, endpoint = context.settings, batch.request.endpoint
    reader = InputLines(context.files, found, settings.max_line_bytes, number=state.next_line, offset=state.next_offset)
    try:
        for _ in range(_STEP_LINES):
            if (raw := reader.next()) is None or lines.error_bytes >= settings.min_part_bytes:
                break
            state.next_line, state.next_offset = raw.number + 1, raw.end
            request_id = request_of(batch.request.id, raw.number)
            lines.add([unanswered(raw.number, request_id, _custom_id(raw.data, endpoint), code, message)])
    except (InputDeleted, orjson.JSONDecodeError):
        state.next_line = 0
    finally:
        reader.close()
    _write(context, batch, folder, state, lines)
    if reader.exhausted or not state.next_line:
        checkpoint.phase = Phase.END


def _custom_id(data: bytes | None, endpoint: str) -> str:
    try:
        return read_line(data, endpoint, 0).custom_id
    except BadLine:
        return ""


def _merged_lines(context: BatchContext, folder: RunFolder, checkpoint: Checkpoint, state: MergeState) -> MergedLines:
    """A step's lines, with those that earlier steps have written."""
    stored = context.store.get(folder.name("bits", f"{state.plan}-{state.steps:06d}")) if state.steps else b""
    return MergedLines(LineBitmap(stored or b"", line_count=checkpoint.end_line))


def _write(context: BatchContext, batch: Batch, folder: RunFolder, state: MergeState, lines: MergedLines) -> None:
    """Write a step's lines as parts, and the lines that are written so far."""
    if lines.output:
        state.output.append(_part(context, batch, state, "output", len(state.output), lines.output, lines.output_bytes))
    if lines.errors:
        state.errors.append(_part(context, batch, state, "error", len(state.errors), lines.errors, lines.error_bytes))
    state.steps += 1
    context.store.put(folder.name("bits", f"{state.plan}-{state.steps:06d}"), lines.merged.pack())
    state.completed += lines.completed
    state.failed += lines.failed
    state.usage = [a + b for a, b in zip(state.usage, lines.usage, strict=True)]


def _part(
    context: BatchContext, batch: Batch, state: MergeState, kind: str, number: int, pieces: list[bytes], size_bytes: int
) -> Part:
    file_id = file_of(batch.request.id, kind)
    first = context.files.part_name(Tenant(batch.request.tenant), file_id, number)
    name = f"{first}-{state.plan}"
    with context.store.writer(name) as writer:
        for at in range(0, len(pieces), _WRITE_LINES):
            writer.write(b"".join(pieces[at : at + _WRITE_LINES]))
    return Part(name=name, size=size_bytes)


def publish_files(context: BatchContext, batch: Batch, checkpoint: Checkpoint) -> None:
    """Make files of the parts; doing it again changes nothing."""
    state = checkpoint.merge
    if state is None:
        return
    ids: dict[str, str | None] = {"output": None, "error": None}
    for kind, parts in (("output", state.output), ("error", state.errors)):
        if not parts:
            continue
        ids[kind] = file_id = file_of(batch.request.id, kind)
        expiry = batch.request.output_expires_after
        context.files.add(
            FileRecord(
                id=file_id,
                tenant=batch.request.tenant,
                filename=f"{batch.request.id}_{kind}.jsonl",
                purpose="batch_output",
                created_at=state.began_at,
                bytes=sum(part.size for part in parts),
                expires_at=None if expiry is None else state.began_at + expiry.seconds,
                parts=tuple(parts),
            )
        )
    usage = dict(zip(USAGE, state.usage, strict=True))
    checkpoint.publish(
        checkpoint.progress.status,
        output_file_id=ids["output"],
        error_file_id=ids["error"],
        completed=state.completed,
        failed=state.failed,
        usage=usage if any(state.usage) else {},
    )
