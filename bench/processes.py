"""Start and stop the processes of a benchmark, and read their CPU time from /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.support.processes import Child
from tests.support.waiting import eventually

READY_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class DidNotStart(Exception):
    """A process of the benchmark did not get ready; the message has the end of its log."""


@asynccontextmanager
async def running(module: str, arguments: Sequence[str], log: Path) -> AsyncIterator[int]:
    """``python -m module arguments`` until the block ends; its output goes to ``log``. Yields its process id."""
    process = Child(module, [sys.executable, "-m", module, *arguments], log)
    process.start()
    try:
        yield process.pid
    finally:
        with contextlib.suppress(AssertionError):
            await asyncio.to_thread(process.terminate, STOP_LIMIT_S)
        process.kill_group()


async def until_answers(url: str, log: Path, *, wanted: str = "") -> None:
    """Wait until ``url`` answers 200 with ``wanted`` in its body."""

    async def answers() -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url) as answer:
                return answer.status == 200 and wanted in await answer.text()
        return False

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        try:
            await eventually(answers, f"{url} answers with {wanted!r}", limit_s=READY_LIMIT_S, every_s=0.05)
        except AssertionError as error:
            raise DidNotStart(f"{error}\n{_tail(log)}") from None


def new_folder(path: Path) -> Path:
    """``path``, made."""
    path.mkdir(parents=True)
    return path


def _tail(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-2000:]


def cpu_seconds(roots: Iterable[int]) -> dict[int, float]:
    """User and system CPU time by process, of ``roots`` and everything they started that still runs."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text("ascii", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name in parentheses may hold spaces: count fields from behind it (proc(5)).
        fields = stat[stat.rindex(")") + 2 :].split()
        parents[int(entry.name)] = int(fields[1])
        spent[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    wanted = set(roots)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in wanted}
        grown = not children <= wanted
        wanted |= children
    return {pid: spent[pid] for pid in wanted if pid in spent}
