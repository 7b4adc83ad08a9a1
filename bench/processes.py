"""Start and stop the processes of a benchmark, and read what they and the rest of the machine use from /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.support.processes import Child
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[1]
READY_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20


class DidNotStart(Exception):
    """A process of the benchmark did not get ready; the message has the end of its log."""


@asynccontextmanager
async def running_program(
    command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None
) -> AsyncIterator[int]:
    """``command`` in the project's folder until the block ends; its output goes to ``log``. Yields its process id."""
    process = Child(Path(command[0]).name, [str(part) for part in command], log, env=env, cwd=ROOT)
    process.start()
    try:
        yield process.pid
    finally:
        with contextlib.suppress(AssertionError):
            await asyncio.to_thread(process.terminate, STOP_LIMIT_S)
        process.kill_group()


@asynccontextmanager
async def running(module: str, arguments: Sequence[str], log: Path) -> AsyncIterator[int]:
    """``python -m module arguments``, as :func:`running_program`."""
    async with running_program([sys.executable, "-m", module, *arguments], log) as pid:
        yield pid


async def until_answers(
    url: str, log: Path, *, wanted: str = "", limit_s: float = READY_LIMIT_S, pid: int | None = None
) -> None:
    """Wait until ``url`` answers 200 with ``wanted`` in its body. Raises ``DidNotStart`` with the end of ``log``, at
    once if process ``pid`` has ended."""

    async def answers() -> bool:
        if pid is not None and _ended(pid):
            raise DidNotStart(f"it ended before {url} answered\n{_tail(log)}")
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url) as answer:
                return answer.status == 200 and wanted in await answer.text()
        return False

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        try:
            await eventually(answers, f"{url} answers with {wanted!r}", limit_s=limit_s, every_s=0.05)
        except AssertionError as error:
            raise DidNotStart(f"{error}\n{_tail(log)}") from None


def new_folder(path: Path) -> Path:
    """``path``, made."""
    path.mkdir(parents=True)
    return path


def _ended(pid: int) -> bool:
    """Whether a child of ours runs no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except FileNotFoundError:
        return True
    return stat[stat.rindex(")") + 2] == "Z"


def _tail(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-2000:]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """CPU time, in seconds, used until a moment: by each process (children that ended included), and by the machine as
    the kernel's ticks sampled it, time stolen by other guests included."""

    at: float
    parents: Mapping[int, int]
    spent: Mapping[int, float]
    machine_s: float

    def tree(self, roots: Iterable[int]) -> set[int]:
        """``roots`` and everything they started that still runs."""
        wanted = set(roots)
        grown = True
        while grown:
            children = {pid for pid, parent in self.parents.items() if parent in wanted}
            grown = not children <= wanted
            wanted |= children
        return wanted

    def cpu_s(self, *roots: int) -> float:
        """User and system time of the processes ``roots`` and everything they started."""
        return sum(self.spent.get(pid, 0.0) for pid in self.tree(roots))


def snapshot() -> Snapshot:
    """What has been used until now."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text("ascii", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name in parentheses may hold spaces: count fields from behind it (proc(5)).
        fields = stat[stat.rindex(")") + 2 :].split()
        parents[int(entry.name)] = int(fields[1])
        spent[int(entry.name)] = _own_cpu_s(int(entry.name), fields) + sum(map(int, fields[13:15])) / TICKS_PER_S
    # Time of interrupts is left out: it is counted either with processes or on its own, as the kernel was built.
    user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text("ascii").split()[1:9])
    return Snapshot(time.monotonic(), parents, spent, (user + nice + system + steal) / TICKS_PER_S)


def cpu_clock_s(pid: int) -> float:
    """User and system time of a process, all its threads, those that ended included. Raises ``OSError`` without it."""
    return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)


def _own_cpu_s(pid: int, fields: Sequence[str]) -> float:
    """The same, also where the process has no clock of its own."""
    try:
        return cpu_clock_s(pid)  # nanoseconds: /proc has only ticks of 10 ms
    except OSError:
        return sum(map(int, fields[11:13])) / TICKS_PER_S


def foreign_cores(before: Snapshot, after: Snapshot) -> float:
    """How many cores everything but this process and what it started used between two moments.

    The larger of two estimates: what processes that are not ours used, and what the machine used beyond ours (guests
    and containers that cannot be seen from here show only there, and ticks sample coarsely).
    """
    ours = after.cpu_s(os.getpid()) - before.cpu_s(os.getpid())
    seen = sum(after.spent.values()) - sum(before.spent.values()) - ours
    return max(0.0, seen, after.machine_s - before.machine_s - ours) / (after.at - before.at)


def memory_mib(roots: Iterable[int]) -> float:
    """Resident memory, in MiB, of ``roots`` and everything they started; pages that several share count for each."""
    size = 0
    for pid in snapshot().tree(roots):
        with contextlib.suppress(OSError):
            size += int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return size / _MIB


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """User and system time of each of ``pids`` that runs, with everything it started."""
    now = snapshot()
    return {pid: now.cpu_s(pid) for pid in pids if pid in now.spent}
