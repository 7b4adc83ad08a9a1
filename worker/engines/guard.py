"""Runs one command and ends its whole process group when the owner is gone, however the owner went.

The owner starts this file with a Python of any version as the leader of a new process group: standard input is a pipe
that the owner holds open and never writes to, the arguments are the command. When the pipe closes, the group gets
SIGTERM and, ``LIMIT_S`` later, SIGKILL. The exit code is the command's, 128 + n if a signal ended it.

Standard library only: it is started on its own, in milliseconds, before an engine that takes minutes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

LIMIT_S = 10.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` until it ends."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_guard)  # noqa: S603, PLW1509
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        return 127
    # Only now, so that the command starts with the usual reaction to signals.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_group_with_owner, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_group_with_owner() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(LIMIT_S)
    os.killpg(0, signal.SIGKILL)


def _die_with_the_guard() -> None:
    """In the child, single-threaded here: not even SIGKILL of the guard leaves an engine behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
