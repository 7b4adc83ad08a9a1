"""Watch a batch: show rate, time left and failures until it has ended or Ctrl-C."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from inferq.batch.client import BatchClient, BatchView
from inferq.client import RequestFailed
from inferq.console import err, visible

OUTAGE_LIMIT_S = 600.0
"""The watch, not the batch, ends after so long without an answer of a Router."""
_MIN_LOOK_S, _MAX_LOOK_S = 0.25, 5.0
_FIRST_WAIT_S = 1.0
_LINE_EVERY_S = 10.0
_SAMPLES, _SAMPLE_EVERY_S = 30, 1.0
EXIT_TROUBLE, EXIT_RUNNING = 1, 3


class Pace:
    """Lines per second over the last half minute of watching, and the time left at that rate."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def saw(self, now_s: float, done: int) -> None:
        if not self._seen or now_s - self._seen[-1][0] >= _SAMPLE_EVERY_S:
            self._seen.append((now_s, done))

    def rate(self, now_s: float, done: int) -> float:
        """Lines per second; 0 until a line finishes while watched."""
        if not self._seen:
            return 0.0
        since_s, before = self._seen[0]
        return max(0.0, (done - before) / (now_s - since_s)) if now_s > since_s else 0.0

    def describe(self, now_s: float, done: int, total: int) -> str:
        rate = self.rate(now_s, done)
        if not rate:
            return ""
        return f"{rate:.1f}/s, {duration(max(0, total - done) / rate)} left"


def duration(seconds: float) -> str:
    """``42 s``, ``3:05 min``, ``2:10 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def exit_code(batch: BatchView) -> int:
    """0: every line was answered; 1: it has ended otherwise; 3: it has not ended."""
    if not batch.ended:
        return EXIT_RUNNING
    return EXIT_TROUBLE if batch.status != "completed" or batch.request_counts.failed else 0


async def watch(client: BatchClient, batch_id: str) -> BatchView:
    """Watch a batch until it has ended, with progress on standard error. Ctrl-C leaves the batch running.

    Raises ``RequestFailed`` if no Router answers for ``OUTAGE_LIMIT_S``.
    """
    try:
        return await _watch(client, batch_id)
    except asyncio.CancelledError:
        err.print(f"\nThe batch continues. Come back with: inferq batch status {batch_id} --watch", highlight=False)
        raise


async def _watch(client: BatchClient, batch_id: str) -> BatchView:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}{task.fields[pace]}"),
    )
    pace, began = Pace(), time.monotonic()
    log_lines = _LogLines()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("validating", total=None, failed="", pace="")
        while True:
            batch = await _look(client, batch_id, bar)
            now, counts = time.monotonic(), batch.request_counts
            done = counts.completed + counts.failed
            if batch.status != "validating":
                pace.saw(now, done)
            failed = f"[red]{counts.failed} failed[/red]  " if counts.failed else ""
            text = pace.describe(now, done, counts.total) if batch.status == "in_progress" else ""
            bar.update(
                task, description=batch.status, completed=done, total=counts.total or None, failed=failed, pace=text
            )
            if not err.is_terminal:
                log_lines.update(now, batch, text)
            if batch.ended:
                return batch
            await asyncio.sleep(min(max((now - began) / 20, _MIN_LOOK_S), _MAX_LOOK_S))


class _LogLines:
    """Prints lines for a log if there is no terminal: at each change of status, and every 10 s."""

    def __init__(self) -> None:
        self._status, self._printed_s = "", 0.0

    def update(self, now_s: float, batch: BatchView, pace: str) -> None:
        if batch.status == self._status and now_s - self._printed_s < _LINE_EVERY_S:
            return
        self._status, self._printed_s = batch.status, now_s
        counts = batch.request_counts
        parts = [f"{counts.completed} of {counts.total} done", f"{counts.failed} failed", pace]
        err.print(f"{batch.id} {batch.status}: {', '.join(filter(None, parts))}", markup=False)


async def _look(client: BatchClient, batch_id: str, bar: Progress) -> BatchView:
    failing_since: float | None = None
    while True:
        try:
            return await client.batch(batch_id)
        except RequestFailed as refused:
            if not refused.transient:
                raise
            now = time.monotonic()
            if failing_since is None:
                failing_since = now
                bar.console.print(f"[yellow]{escape(visible(refused.message))}; trying again[/yellow]")
            if now - failing_since > OUTAGE_LIMIT_S:
                raise RequestFailed(
                    f"{refused.message}. The batch continues by itself: inferq batch status {batch_id} --watch"
                ) from refused
            await asyncio.sleep(_MAX_LOOK_S if now - failing_since > _MAX_LOOK_S else _FIRST_WAIT_S)
