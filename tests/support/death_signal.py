"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on this process gets SIGKILL when its parent ends (Linux: prctl(2))."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
