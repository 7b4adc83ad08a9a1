"""Processes of this machine as proc(5) tells of them: which are of one session, and since when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.05
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Another one after each boot."""
    return _BOOT_ID.read_text().strip()


def start_of(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot; None if it has ended."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def session_members(session: int, since: int) -> list[int]:
    """The running processes of ``session`` that were started at ``since`` or later."""
    return [pid for pid in _all_pids() if _is_in_session(pid, session, since)]


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Wait for ``condition``; False if it does not come true within the limit."""
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(_POLL_S)
    return True


def _stat(pid: int) -> list[str] | None:
    """The fields of proc_pid_stat(5) from the state on; None if no such process runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in {"Z", "X"} else fields


def _is_in_session(pid: int, session: int, since: int) -> bool:
    fields = _stat(pid)
    return fields is not None and int(fields[3]) == session and int(fields[19]) >= since


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
