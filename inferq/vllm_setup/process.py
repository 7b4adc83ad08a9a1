"""Run the long commands of a set-up: their output to a log, their progress to a person, never left behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from telemetry.environment import foreign_environment

from .plan import SetupFailed

_TICK_S = 1.0
_END_LIMIT_S = 10.0
_KEPT_BYTES = 64 * 1024


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    lock_fd: int,
    limit_s: float,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run ``command``; gives its exit code and the last 64 KiB that it printed.

    ``on_line`` gets each line, ``on_tick`` is called each second or so. The child inherits ``lock_fd``
    (:func:`.cache.locked`) and ends when this call is left. Raises :class:`SetupFailed` after ``limit_s``.
    """
    limit = time.monotonic() + limit_s
    kept = bytearray()
    unfinished = b""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**foreign_environment(), **(environment or {})},
            pass_fds=(lock_fd,),
            start_new_session=True,
        ) as child,
        selectors.DefaultSelector() as selector,
    ):
        assert child.stdout is not None  # noqa: S101 - a pipe was asked for
        selector.register(child.stdout, selectors.EVENT_READ)
        try:
            while True:
                if time.monotonic() > limit:
                    raise SetupFailed(f"a step took longer than {limit_s / 60:.0f} minutes; see {log}.")
                on_tick()
                if not selector.select(_TICK_S):
                    continue
                piece = os.read(child.stdout.fileno(), 65_536)
                if not piece:
                    break
                output.write(piece)
                output.flush()
                kept = (kept + piece)[-_KEPT_BYTES:]
                *lines, unfinished = (unfinished + piece).split(b"\n")
                for line in lines:
                    on_line(line.decode("utf-8", "replace").strip())
            code = child.wait(max(1.0, limit - time.monotonic()))
        finally:
            _end(child)
    return code, kept.decode("utf-8", "replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started, if it still runs."""
    if child.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(child.pid, number)
        try:
            child.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            continue
        return
