"""``inferq batch status | list | cancel | errors``: print batches and their errors."""

from __future__ import annotations

import time
from typing import Any

import orjson
from rich.text import Text

from inferq.batch.client import BatchClient, BatchView, LineError, fields_of
from inferq.console import err, out, print_json, visible
from inferq.tables import Column, Row, print_table

from .lines import lines_of
from .watch import EXIT_RUNNING, duration, exit_code, watch

_CHARS = 300
_CLOCK = "%Y-%m-%d %H:%M:%S"


async def show_status(client: BatchClient, batch_id: str, *, watched: bool, as_json: bool) -> int:
    """Print the state of a batch; the exit code."""
    async with client:
        batch = await (watch(client, batch_id) if watched else client.batch(batch_id))
    if as_json:
        print_json(fields_of(batch))
    elif batch.ended:
        print_end(batch)
    else:
        out.print(visible(_summary(batch)), markup=False)
    return exit_code(batch)


async def list_batches(client: BatchClient, *, limit: int, as_json: bool) -> int:
    """Print the newest batches; the exit code."""
    async with client:
        found = await client.batches(limit)
    if as_json:
        print_json([fields_of(batch) for batch in found])
    elif found:
        print_table(_COLUMNS, [_row(batch) for batch in found])
    else:
        out.print("No batches yet. Submit one with: inferq batch submit FILE")
    return 0


async def cancel_batch(client: BatchClient, batch_id: str, *, as_json: bool) -> int:
    """Cancel a batch, keeping finished lines; the exit code."""
    async with client:
        batch = await client.cancel(batch_id)
    if as_json:
        print_json(fields_of(batch))
    else:
        out.print(visible(_summary(batch)), markup=False)
    return 0


async def show_errors(client: BatchClient, batch_id: str, *, as_json: bool) -> int:
    """Print why the input was refused, then every line without a successful answer, as they arrive.

    Exit code 0: the batch has ended without errors; 1: it has errors; 3: none yet, it has not ended.
    """
    count = 0
    async with client:
        batch = await client.batch(batch_id)
        for refusal in batch.line_errors:
            count += 1
            _print_refusal(refusal, as_json=as_json)
        if batch.error_file_id is not None:
            async for line in lines_of(client, batch.error_file_id):
                count += 1
                _print_failure(line, as_json=as_json)
    if not as_json:
        state = "It has not ended yet." if not batch.ended else ""
        err.print(f"{count} errors. {state}".strip())
    if count:
        return 1
    return 0 if batch.ended else EXIT_RUNNING


def print_end(batch: BatchView) -> None:
    """Print how a batch has ended, and what to do next."""
    style = "green" if exit_code(batch) == 0 else "yellow" if batch.status == "completed" else "red"
    out.print(Text(visible(_summary(batch)), style=style))
    for refusal in batch.line_errors[:5]:
        _print_refusal(refusal, as_json=False)
    if batch.output_file_id:
        err.print(f"Its answers: inferq batch results {batch.id} -o out.jsonl", markup=False)
    if batch.error_file_id or len(batch.line_errors) > 5:
        err.print(f"What went wrong: inferq batch errors {batch.id}", markup=False)


def _summary(batch: BatchView) -> str:
    counts = batch.request_counts
    if batch.status == "failed":
        return f"{batch.id} failed: its input file is invalid"
    text = f"{batch.id} {batch.status}: {counts.completed} of {counts.total} done, {counts.failed} failed"
    ended = _ended_at(batch)
    if ended is None or batch.in_progress_at is None:
        return text
    took_s = max(1, ended - batch.in_progress_at)
    return f"{text}, in {duration(took_s)} ({(counts.completed + counts.failed) / took_s:.1f}/s)"


def _ended_at(batch: BatchView) -> int | None:
    stamps: dict[str, Any] = batch.model_extra or {}
    found = stamps.get("finalizing_at") or stamps.get(f"{batch.status}_at")
    return found if batch.ended and isinstance(found, int) else None


def _print_refusal(refusal: LineError, *, as_json: bool) -> None:
    if as_json:
        print_json(refusal.model_dump(), line=True)
        return
    where = f"line {refusal.line}: " if refusal.line is not None else ""
    out.print(visible(f"{where}{refusal.message} ({refusal.code})"), markup=False)


def _print_failure(line: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(line, line=True)
        return
    error = line.get("error") or {}
    response = line.get("response") or {}
    status = response.get("status_code")
    body = response.get("body")
    inner = (body.get("error") if isinstance(body, dict) else None) or {}
    code = error.get("code") or (f"HTTP {status}" if status else "error")
    message = error.get("message") or (inner.get("message") if isinstance(inner, dict) else None)
    text = str(message) if message else orjson.dumps(body).decode()[:_CHARS]
    out.print(visible(f"{line.get('custom_id')}: {text} ({code})"), markup=False)


_COLUMNS = (
    Column("ID"),
    Column("CREATED", 3),
    Column("STATUS", 1),
    Column("DONE", 2, right=True),
    Column("FAILED", 4, right=True),
    Column("MODEL", 5, shrinks=True),
    Column("ENDPOINT", 6),
)


def _row(batch: BatchView) -> Row:
    counts = batch.request_counts
    created = time.strftime(_CLOCK, time.localtime(batch.created_at))
    done = f"{counts.completed}/{counts.total}"
    return Row((batch.id, created, batch.status, done, str(counts.failed), batch.model or "", batch.endpoint))
