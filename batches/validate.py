"""The first steps of a batch: every line is looked at before any is run."""

from __future__ import annotations

import secrets

from queue_schemas import Pool
from storage import Batch, BatchError, BatchStatus, FileRecord
from telemetry.threads import in_thread

from .context import BatchContext, Folder, input_of
from .core import (
    MAX_ERRORS,
    MAX_RECORDS,
    RECORD,
    SLICES,
    TABLE,
    BadLine,
    Phase,
    Work,
    custom_id_digest,
    pack_run,
    read_line,
    record,
    repeated,
    slice_bounds,
)
from .input import InputGone, InputLines

_RECORDS_AT_ONCE = 25_000
_LINES_BETWEEN_LOOKS = 64


async def validate(context: BatchContext, batch: Batch, folder: Folder, work: Work, until_s: float) -> float:
    """Go on until ``until_s`` (monotonic), or the end. The seconds after which to go on."""
    if batch.cancel_asked_at is not None:
        _end(work, BatchStatus.CANCELLED)
    elif context.now_s() >= batch.request.expires_at:
        _end(work, BatchStatus.EXPIRED)
    elif work.phase is Phase.READ and not work.read_all:
        await in_thread(lambda: _read(context, batch, folder, work, until_s))
    elif work.phase is Phase.READ and not work.errors:
        return await _check_model(context, work)
    elif work.phase is Phase.COMPARE and work.slices < SLICES and not work.full_of_errors:
        await in_thread(lambda: _compare(context, folder, work, until_s))
    elif work.errors:
        _end(work, BatchStatus.FAILED)
    else:
        _begin(context, work)
    return 0


def _end(work: Work, outcome: BatchStatus) -> None:
    work.outcome, work.phase = outcome, Phase.END


def _begin(context: BatchContext, work: Work) -> None:
    """All lines can be run."""
    work.publish(BatchStatus.IN_PROGRESS, total=work.total)
    work.stamp("in_progress_at", context.now_s())
    work.last_line = work.number
    work.number, work.offset, work.read_all = 1, 0, False
    work.runs, work.slices = [], 0
    work.phase = Phase.PUMP


def _read(context: BatchContext, batch: Batch, folder: Folder, work: Work, until_s: float) -> None:
    """Look at lines, one by one."""
    found = input_of(context.files, batch)
    if found is None:
        work.fault(input_deleted(batch))
        work.read_all = True
        return
    most = context.input_bytes
    if found.bytes > most:
        work.fault(_error("file_too_large", f"the input file has {found.bytes} bytes; {most} are the most", None))
        work.read_all = True
        return
    while not work.read_all:
        records = _read_run(context, batch, found, work, until_s)
        if records:
            name = f"{len(work.runs):06d}-{secrets.token_hex(6)}"
            context.store.put(folder.name("ids", name), pack_run(records))
            work.runs.append(name)
        if context.tick_s() >= until_s:
            break
    if work.read_all and not work.total and not work.errors:
        work.fault(_error("empty_file", "the input file has no lines; each line is one request", None))


def _read_run(context: BatchContext, batch: Batch, found: FileRecord, work: Work, until_s: float) -> list[bytes]:
    """Look at as many lines as one run holds, or there is time for."""
    settings = context.settings
    lines = InputLines(context.files, found, settings.max_line_bytes, number=work.number, offset=work.offset)
    limits = settings.limits_of(batch.request.tenant)
    records: list[bytes] = []
    try:
        while (raw := lines.next()) is not None:
            work.number, work.offset = raw.number + 1, raw.end
            work.total += 1
            if work.total > settings.max_lines:
                work.fault(_error("too_many_lines", f"the input file has more than {settings.max_lines} lines", None))
                work.read_all = True
                return records
            try:
                line = read_line(raw.data, batch.request.endpoint, settings.max_line_bytes, limits)
                _same_model(work, line.model)
            except BadLine as bad:
                work.fault(BatchError(code=bad.code, message=bad.message, param=bad.param, line=raw.number))
                if work.full_of_errors or bad.code == "invalid_encoding":
                    work.read_all = True
                    return records
            else:
                records.append(record(custom_id_digest(line.custom_id), raw.number))
            if len(records) >= MAX_RECORDS:
                return records
            if not work.total % _LINES_BETWEEN_LOOKS and context.tick_s() >= until_s:
                return records
    except InputGone:
        work.fault(input_deleted(batch))
    finally:
        lines.close()
    work.read_all = True
    return records


def _same_model(work: Work, model: str) -> None:
    known = work.progress.model
    if known is None:
        work.publish(work.progress.status, model=model)
    elif model != known:
        raise BadLine(
            "mismatched_model",
            f"all lines of a batch ask the same model: {known[:200]!r}, not {model[:200]!r}",
            "body.model",
        )


async def _check_model(context: BatchContext, work: Work) -> float:
    """An error if no worker has ever named the model; the seconds to wait while one may still do."""
    model = Pool(work.progress.model or "")
    broker = context.queue()
    known = model in await broker.fleet.known_pools()
    if known or any(model in worker.models for worker in (await broker.fleet.load_workers()).values()):
        work.phase = Phase.COMPARE
        return 0
    now = context.now_s()
    work.unknown_since = work.unknown_since or now
    left = work.unknown_since + context.settings.model_wait_ms / 1000 - now
    if left > 0:
        return min(left, 1.0)
    sentence = f"there is no model {model[:200]!r} here; GET /v1/models lists those that there are"
    work.fault(BatchError(code="model_not_found", message=sentence, param="body.model", line=1))
    return 0


def _compare(context: BatchContext, folder: Folder, work: Work, until_s: float) -> None:
    """Look for ids that stand twice, slice by slice."""
    tables: dict[str, tuple[int, ...]] = {}
    at_once = max(1, SLICES * _RECORDS_AT_ONCE // max(work.total, 1))
    while work.slices < SLICES and not work.full_of_errors:
        last = min(SLICES, work.slices + at_once)
        parts = []
        for name in work.runs:
            run = folder.name("ids", name)
            if name not in tables:
                tables[name] = TABLE.unpack(context.store.read(run, 0, TABLE.size))
            start, end = slice_bounds(tables[name], work.slices, last)
            if end - start >= RECORD:
                parts.append(context.store.read(run, start, end))
        for line, before in repeated(parts, MAX_ERRORS):
            sentence = f"the custom_id of line {line} stands in line {before} already; give each line one of its own"
            work.fault(BatchError(code="duplicate_custom_id", message=sentence, param="custom_id", line=line))
        work.slices = last
        if context.tick_s() >= until_s:
            break


def input_deleted(batch: Batch) -> BatchError:
    file_id = batch.request.input_file_id
    return _error("input_file_deleted", f"the input file {file_id} was deleted before the batch ended", "input_file_id")


def _error(code: str, message: str, param: str | None) -> BatchError:
    return BatchError(code=code, message=message, param=param)
