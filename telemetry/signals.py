"""Reset the signal handling that a process inherits from its parent."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading


def take_signals() -> None:
    """Make SIGINT and SIGTERM end this process again, and children's ends be told, if the parent had it otherwise.

    ``nohup`` and the background jobs of scripts start programs with SIGINT ignored, and what a parent blocks stays
    blocked. SIGHUP stays ignored, which is what ``nohup`` is for. Does nothing but in the main thread.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))


def leave_terminal() -> None:
    """Send what is still written to a terminal nowhere: to write to one that has hung up is an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
        except OSError:  # closed by our parent
            continue
    os.close(nowhere)
