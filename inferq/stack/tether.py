"""Started as a script: asks the kernel to be killed when its parent dies (Linux), then becomes the given command.

``python tether.py PARENT_PID COMMAND...``. Nothing that `inferq up` started outlives it, not even its SIGKILL. A
``preexec_fn`` could do the same, but is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is the point
