"""Processes of a benchmark: started on free ports, ended for certain, their CPU time read from /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

READY_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class DidNotStart(Exception):
    """A process of the benchmark did not get ready; the message has the end of its log."""


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@asynccontextmanager
async def running(module: str, arguments: Sequence[str], log: Path) -> AsyncIterator[int]:
    """``python -m module arguments`` until the block ends; its output goes to ``log``. Yields its process id."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, stdout=output, stderr=output, stdin=asyncio.subprocess.DEVNULL
        )
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def until_answers(url: str, log: Path, *, wanted: str = "") -> None:
    """Wait until ``url`` answers 200 with ``wanted`` in its body."""
    limit = time.monotonic() + READY_LIMIT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while time.monotonic() < limit:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as answer:
                    if answer.status == 200 and wanted in await answer.text():
                        return
            await asyncio.sleep(0.05)
    raise DidNotStart(f"{url} did not answer with {wanted!r} within {READY_LIMIT_S:g} s\n{_tail(log)}")


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
