"""Run one command, and end its whole process group when its owner has ended, by a signal or otherwise.

The owner starts this file as the leader of a new process group: standard input is a pipe that the owner holds open and
never writes to, the arguments are a limit in seconds and the command. When the pipe closes, the group gets SIGTERM
and, after the limit, SIGKILL. The exit code is the command's, 128 + n if a signal ended it.

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

_PR_SET_PDEATHSIG = 1


def main(limit_s: float, command: list[str]) -> int:
    """Run ``command`` until it ends."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_guard)  # noqa: S603, PLW1509
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        return 127
    # Only now, so that the command starts with the usual reaction to signals.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_group_with_owner, args=(limit_s,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_group_with_owner(limit_s: float) -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(limit_s)
    os.killpg(0, signal.SIGKILL)


def _die_with_the_guard() -> None:
    """In the child, single-threaded here: not even SIGKILL of the guard leaves an engine behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
