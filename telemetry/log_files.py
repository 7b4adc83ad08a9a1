"""Open the log files of roles and engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_FILE_MODE, _FOLDER_MODE = 0o660, 0o770
"""Before the umask: engines write prompts, and we write addresses, nobody else's to read. A group may collect logs."""


def open_log(path: Path) -> BinaryIO:
    """``path``, to append to without a buffer, made with its folder if need be. Raises ``OSError``."""
    path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE)
    return os.fdopen(descriptor, "ab", buffering=0)
