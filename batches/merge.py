"""The last steps of a batch: chunks become the parts of its output and error files.

Every step is decided by what it reads, not by the time, so that whoever repeats one writes the same parts; and each
plan (a frozen list of chunks) has parts of its own.
"""

from __future__ import annotations

import secrets

import orjson

from queue_schemas import Tenant
from storage import Batch, BatchStatus, FileRecord, Part
from telemetry.threads import in_thread

from .context import BatchContext, Folder, input_of
from .core import USAGE, BadLine, Bits, Fold, Merge, Phase, Work, file_of, read_line, request_of, unanswered
from .input import InputGone, InputLines

_CHUNKS_AT_ONCE = 64
_LINES_AT_ONCE = 20_000
_LINES_IN_A_WRITE = 256
_RESTS = {
    BatchStatus.EXPIRED: ("batch_expired", "this line was not answered before the batch's completion window ended"),
    BatchStatus.COMPLETED: ("answer_lost", "the line's answer is missing in the file store; send it in another batch"),
}
"""What is said of lines without a result, by how the batch ends; of others nothing is."""


async def merge(context: BatchContext, batch: Batch, folder: Folder, work: Work) -> None:
    """One step."""
    if work.merge is None:
        await in_thread(lambda: _plan(context, batch, folder, work))
    elif work.phase is Phase.MERGE:
        await in_thread(lambda: _chunks(context, batch, folder, work))
    elif work.phase is Phase.REST:
        await in_thread(lambda: _rest(context, batch, folder, work))


def _plan(context: BatchContext, batch: Batch, folder: Folder, work: Work) -> None:
    plan = secrets.token_hex(6)
    context.store.put(folder.name("plans", plan), "\n".join(folder.chunks()).encode())
    work.merge = Merge(plan=plan, began_at=int(context.now_s()), usage=[0] * len(USAGE))
    if work.outcome is not BatchStatus.CANCELLED:
        work.publish(BatchStatus.FINALIZING)
    work.stamp("finalizing_at", context.now_s())


def _chunks(context: BatchContext, batch: Batch, folder: Folder, work: Work) -> None:
    """The next chunks, until a part has its size."""
    state = work.merge
    assert state is not None  # noqa: S101 - made by _plan
    names = [name for name in (context.store.get(folder.name("plans", state.plan)) or b"").decode().split("\n") if name]
    fold = _fold(context, folder, work, state)
    most = context.settings.min_part_bytes
    last = min(len(names), state.chunk + _CHUNKS_AT_ONCE)
    at = state.chunk
    while at < last and fold.output_bytes < most and fold.error_bytes < most:
        fold.add(folder.chunk(names[at]))
        at += 1
    _keep(context, batch, folder, state, fold)
    state.chunk = at
    if at == len(names):
        complete = state.completed + state.failed >= work.total
        work.phase = Phase.END if complete or work.outcome not in _RESTS else Phase.REST


def _rest(context: BatchContext, batch: Batch, folder: Folder, work: Work) -> None:
    """The next lines of the input: those without a result go to the error file."""
    state = work.merge
    assert state is not None and work.outcome is not None  # noqa: S101 - made by _plan; the phase has an outcome
    code, message = _RESTS[work.outcome]
    found = input_of(context.files, batch)
    if found is None:
        work.phase = Phase.END
        return
    fold = _fold(context, folder, work, state)
    settings, endpoint = context.settings, batch.request.endpoint
    lines = InputLines(context.files, found, settings.max_line_bytes, number=state.number, offset=state.offset)
    try:
        for _ in range(_LINES_AT_ONCE):
            if (raw := lines.next()) is None or fold.error_bytes >= settings.min_part_bytes:
                break
            state.number, state.offset = raw.number + 1, raw.end
            request_id = request_of(batch.request.id, raw.number)
            fold.add([unanswered(raw.number, request_id, _custom_id(raw.data, endpoint), code, message)])
    except (InputGone, orjson.JSONDecodeError):
        state.number = 0
    finally:
        lines.close()
    _keep(context, batch, folder, state, fold)
    if lines.exhausted or not state.number:
        work.phase = Phase.END


def _custom_id(data: bytes | None, endpoint: str) -> str:
    try:
        return read_line(data, endpoint, 0).custom_id
    except BadLine:
        return ""


def _fold(context: BatchContext, folder: Folder, work: Work, state: Merge) -> Fold:
    """What has been written so far, by its bits."""
    stored = context.store.get(folder.name("bits", f"{state.plan}-{state.steps:06d}")) if state.steps else b""
    return Fold(Bits(stored or b"", most=work.last_line))


def _keep(context: BatchContext, batch: Batch, folder: Folder, state: Merge, fold: Fold) -> None:
    """Write what a step has found."""
    if fold.output:
        state.output.append(_part(context, batch, state, "output", len(state.output), fold.output, fold.output_bytes))
    if fold.errors:
        state.errors.append(_part(context, batch, state, "error", len(state.errors), fold.errors, fold.error_bytes))
    state.steps += 1
    context.store.put(folder.name("bits", f"{state.plan}-{state.steps:06d}"), fold.bits.pack())
    state.completed += fold.completed
    state.failed += fold.failed
    state.usage = [a + b for a, b in zip(state.usage, fold.usage, strict=True)]


def _part(
    context: BatchContext, batch: Batch, state: Merge, kind: str, number: int, pieces: list[bytes], size_bytes: int
) -> Part:
    file_id = file_of(batch.request.id, kind)
    first = context.files.part_name(Tenant(batch.request.tenant), file_id, number)
    name = f"{first}-{state.plan}"
    with context.store.writer(name) as writer:
        for at in range(0, len(pieces), _LINES_IN_A_WRITE):
            writer.write(b"".join(pieces[at : at + _LINES_IN_A_WRITE]))
    return Part(name=name, size=size_bytes)


def publish_files(context: BatchContext, batch: Batch, work: Work) -> None:
    """The parts become files; again it changes nothing."""
    state = work.merge
    if state is None:
        return
    ids: dict[str, str | None] = {"output": None, "error": None}
    for kind, parts in (("output", state.output), ("error", state.errors)):
        if not parts:
            continue
        ids[kind] = file_id = file_of(batch.request.id, kind)
        keep = batch.request.output_expires_after
        context.files.add(
            FileRecord(
                id=file_id,
                tenant=batch.request.tenant,
                filename=f"{batch.request.id}_{kind}.jsonl",
                purpose="batch_output",
                created_at=state.began_at,
                bytes=sum(part.size for part in parts),
                expires_at=None if keep is None else state.began_at + keep.seconds,
                parts=tuple(parts),
            )
        )
    usage = dict(zip(USAGE, state.usage, strict=True))
    work.publish(
        work.progress.status,
        output_file_id=ids["output"],
        error_file_id=ids["error"],
        completed=state.completed,
        failed=state.failed,
        usage=usage if any(state.usage) else {},
    )
