"""Validate the input of a batch: its first steps check every line before any is run."""

from __future__ import annotations

import secrets

from broker import Broker
from queue_schemas import Lane, Pool
from scheduling.batch_urgency import INFEASIBLE_LOAD, load_alone
from scheduling.cost import estimate_cost
from storage import Batch, BatchError, BatchStatus, FileRecord
from telemetry.threads import in_thread

from ..context import BatchContext
from ..core import (
    MAX_ERRORS,
    MAX_RECORDS,
    RECORD,
    SLICES,
    TABLE,
    BadLine,
    Checkpoint,
    Phase,
    custom_id_digest,
    find_duplicates,
    pack_run,
    read_line,
    record,
    slice_bounds,
)
from .input import InputDeleted, InputLines, input_deleted, input_of
from .run_folder import RunFolder

ALLOW_LATE = "inferq_allow_late"
"""The key of a batch's metadata with which it runs though it cannot end in time."""
LATE_FOR_S = 60.0
"""For so long, or a tenth of its window, a batch must be found too late before it fails."""
_SLICE_RECORDS = 25_000
_LINES_BETWEEN_CHECKS = 64


async def validate(
    context: BatchContext, batch: Batch, folder: RunFolder, checkpoint: Checkpoint, until_s: float
) -> float:
    """Go on until ``until_s`` (monotonic) or the end of the phase; the seconds to wait before the next step."""
    if batch.cancel_asked_at is not None:
        _end(checkpoint, BatchStatus.CANCELLED)
    elif context.now_s() >= batch.request.expires_at:
        _end(checkpoint, BatchStatus.EXPIRED)
    elif checkpoint.phase is Phase.READ and not checkpoint.read_all:
        await in_thread(lambda: _read(context, batch, folder, checkpoint, until_s))
    elif checkpoint.phase is Phase.READ and not checkpoint.errors:
        return await _check_model(context, checkpoint)
    elif (
        checkpoint.phase is Phase.COMPARE_IDS and checkpoint.compared_slices < SLICES and not checkpoint.full_of_errors
    ):
        await in_thread(lambda: _compare(context, folder, checkpoint, until_s))
    elif checkpoint.errors:
        _end(checkpoint, BatchStatus.FAILED)
    elif context.settings.refuse_late and (late := await _late(context, batch, checkpoint)):
        return _refuse(context, batch, checkpoint, late)
    else:
        _begin(context, checkpoint)
    return 0


def _end(checkpoint: Checkpoint, outcome: BatchStatus) -> None:
    checkpoint.outcome, checkpoint.phase = outcome, Phase.END


def _begin(context: BatchContext, checkpoint: Checkpoint) -> None:
    """The input is valid: begin to run its lines."""
    checkpoint.publish(BatchStatus.IN_PROGRESS, total=checkpoint.total)
    checkpoint.stamp("in_progress_at", context.now_s())
    checkpoint.end_line = checkpoint.next_line
    checkpoint.next_line, checkpoint.next_offset, checkpoint.read_all = 1, 0, False
    checkpoint.id_runs, checkpoint.compared_slices = [], 0
    checkpoint.phase = Phase.DISPATCH


def _read(context: BatchContext, batch: Batch, folder: RunFolder, checkpoint: Checkpoint, until_s: float) -> None:
    """Check lines, one by one."""
    found = input_of(context.files, batch)
    if found is None:
        checkpoint.add_error(input_deleted(batch))
        checkpoint.read_all = True
        return
    if found.bytes > context.max_input_bytes:
        checkpoint.add_error(
            _error(
                "file_too_large",
                f"the input file has {found.bytes} bytes; the maximum is {context.max_input_bytes}",
                None,
            )
        )
        checkpoint.read_all = True
        return
    while not checkpoint.read_all:
        records = _read_run(context, batch, found, checkpoint, until_s)
        if records:
            name = f"{len(checkpoint.id_runs):06d}-{secrets.token_hex(6)}"
            context.store.put(folder.name("ids", name), pack_run(records))
            checkpoint.id_runs.append(name)
        if context.tick_s() >= until_s:
            break
    if checkpoint.read_all and not checkpoint.total and not checkpoint.errors:
        checkpoint.add_error(_error("empty_file", "the input file has no lines; each line is one request", None))


def _read_run(
    context: BatchContext, batch: Batch, found: FileRecord, checkpoint: Checkpoint, until_s: float
) -> list[bytes]:
    """Check as many lines as one run of ids holds, or there is time for; their records."""
    settings = context.settings
    lines = InputLines(
        context.files, found, settings.max_line_bytes, number=checkpoint.next_line, offset=checkpoint.next_offset
    )
    limits = settings.limits_of(batch.request.tenant)
    records: list[bytes] = []
    try:
        while (raw := lines.next()) is not None:
            checkpoint.next_line, checkpoint.next_offset = raw.number + 1, raw.end
            checkpoint.total += 1
            if checkpoint.total > settings.max_lines:
                checkpoint.add_error(
                    _error("too_many_lines", f"the input file has more than {settings.max_lines} lines", None)
                )
                checkpoint.read_all = True
                return records
            try:
                line = read_line(raw.data, batch.request.endpoint, settings.max_line_bytes, limits)
                _same_model(checkpoint, line.model)
            except BadLine as bad:
                checkpoint.add_error(BatchError(code=bad.code, message=bad.message, param=bad.param, line=raw.number))
                if checkpoint.full_of_errors or bad.code == "invalid_encoding":
                    checkpoint.read_all = True
                    return records
            else:
                checkpoint.cost += estimate_cost(batch.request.endpoint, raw.data or b"", line.body)
                records.append(record(custom_id_digest(line.custom_id), raw.number))
            if len(records) >= MAX_RECORDS:
                return records
            if not checkpoint.total % _LINES_BETWEEN_CHECKS and context.tick_s() >= until_s:
                return records
    except InputDeleted:
        checkpoint.add_error(input_deleted(batch))
    finally:
        lines.close()
    checkpoint.read_all = True
    return records


def _same_model(checkpoint: Checkpoint, model: str) -> None:
    known = checkpoint.progress.model
    if known is None:
        checkpoint.publish(checkpoint.progress.status, model=model)
    elif model != known:
        raise BadLine(
            "mismatched_model",
            f"all lines of a batch must name the same model: {known[:200]!r}, not {model[:200]!r}",
            "body.model",
        )


async def _check_model(context: BatchContext, checkpoint: Checkpoint) -> float:
    """Report an error if no worker serves, served or could load the model; the seconds to wait while one may join."""
    model = Pool(checkpoint.progress.model or "")
    broker = context.queue()
    known = model in (await broker.known_pools.remembered()).known
    if known or await _is_served(broker, model):
        checkpoint.phase = Phase.COMPARE_IDS
        return 0
    now = context.now_s()
    checkpoint.unknown_since = checkpoint.unknown_since or now
    left = checkpoint.unknown_since + context.settings.model_wait_ms / 1000 - now
    if left > 0:
        return min(left, 1.0)
    sentence = f"there is no model {model[:200]!r} here; GET /v1/models lists the models"
    checkpoint.add_error(BatchError(code="model_not_found", message=sentence, param="body.model", line=1))
    return 0


async def _is_served(broker: Broker, model: Pool) -> bool:
    """Whether a worker serves the model, or could load it: as one of its models, or as an adapter."""
    workers = (await broker.fleet.load_workers()).values()
    if any(model in worker.models or model in worker.loadable for worker in workers):
        return True
    sets = await broker.fleet.load_adapter_sets(sorted({worker.adapter_set for worker in workers} - {""}))
    return any(model in adapters for adapters in sets.values())


async def _late(context: BatchContext, batch: Batch, checkpoint: Checkpoint) -> str:
    """Why the batch cannot end in time; empty if it can, or if that is not known: too little of its model has ended,
    nothing of it runs now, no worker serves it, or an autoscaler may start more."""
    request, broker, model = batch.request, context.queue(), Pool(checkpoint.progress.model or "")
    if (request.metadata or {}).get(ALLOW_LATE) == "true" or model in (await broker.known_pools.remembered()).scaled:
        return ""
    workers = (await broker.fleet.load_workers()).values()
    slots = sum(worker.slots for worker in workers if worker.takes_work and model in worker.models)
    lanes = (await broker.stats.depths()).get(model, {})
    # What predicts a wait has seen enough jobs. Batches are most like batches.
    known = [depth for depth in map(lanes.get, (Lane.BATCH, Lane.BACKGROUND, Lane.INTERACTIVE)) if depth is not None]
    rates = [depth.ms_per_cost for depth in known if depth.predicted_wait_ms is not None]
    ms_per_cost = next((rate for rate in rates if rate is not None), None)
    if not slots or ms_per_cost is None:
        return ""
    time_left_s = request.expires_at - context.now_s()
    load = load_alone(checkpoint.cost, ms_per_cost=ms_per_cost, slots=slots, time_left_s=time_left_s)
    if load < INFEASIBLE_LOAD:
        return ""
    return (
        f"the lines need about {load * time_left_s / 60:,.0f} minutes even if the model's {slots} slots work on "
        f"nothing else, and the completion window leaves {time_left_s / 60:,.0f}: send fewer lines, or run as many as "
        f'there is time for with metadata {{"{ALLOW_LATE}": "true"}}'
    )


def _refuse(context: BatchContext, batch: Batch, checkpoint: Checkpoint, why: str) -> float:
    """Fail a batch that cannot end in time, if that is found for as long as it may last that workers start anew or have
    few slots; the seconds to wait before another look."""
    now = context.now_s()
    since = checkpoint.late_since = checkpoint.late_since or now
    left = since + min(LATE_FOR_S, (batch.request.expires_at - since) / 10) - now
    if left > 0:
        return min(left, 5.0)
    checkpoint.add_error(_error("window_infeasible", why, "completion_window"))
    _end(checkpoint, BatchStatus.FAILED)
    return 0


def _compare(context: BatchContext, folder: RunFolder, checkpoint: Checkpoint, until_s: float) -> None:
    """Look for ids that occur twice, slice by slice."""
    tables: dict[str, tuple[int, ...]] = {}
    step = max(1, SLICES * _SLICE_RECORDS // max(checkpoint.total, 1))
    while checkpoint.compared_slices < SLICES and not checkpoint.full_of_errors:
        last = min(SLICES, checkpoint.compared_slices + step)
        parts = []
        for name in checkpoint.id_runs:
            run = folder.name("ids", name)
            if name not in tables:
                tables[name] = TABLE.unpack(context.store.read(run, 0, TABLE.size))
            start, end = slice_bounds(tables[name], checkpoint.compared_slices, last)
            if end - start >= RECORD:
                parts.append(context.store.read(run, start, end))
        for line, before in find_duplicates(parts, MAX_ERRORS):
            sentence = f"line {line} has the same custom_id as line {before}; give each line a unique one"
            checkpoint.add_error(BatchError(code="duplicate_custom_id", message=sentence, param="custom_id", line=line))
        checkpoint.compared_slices = last
        if context.tick_s() >= until_s:
            break


def _error(code: str, message: str, param: str | None) -> BatchError:
    return BatchError(code=code, message=message, param=param)
