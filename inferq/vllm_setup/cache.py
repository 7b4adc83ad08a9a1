"""The folder of what is made once per user: atomically, by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from telemetry.files import absolute_path

from .plan import SetupFailed
from .progress import Progress

LOCK_LIMIT_S = 1800.0
"""Longest wait for another process that sets up the same thing."""
_POLL_S = 0.2


class NoCacheFolder(SetupFailed):
    """There is no place to set anything up; nothing can have been set up either."""


def cache_dir() -> Path:
    """``INFERQ_CACHE_DIR``, else ``inferq`` in the user's cache folder (XDG base directory specification).

    Raises :class:`NoCacheFolder` for a user without a home.
    """
    given = os.environ.get("INFERQ_CACHE_DIR")
    if given:
        return absolute_path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "inferq"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise NoCacheFolder(
            "this user has no home directory to keep it in: name a folder with INFERQ_CACHE_DIR, or set HOME."
        ) from error
    return home / ".cache" / "inferq"


@contextmanager
def locked(name: str, progress: Progress, limit_s: float = LOCK_LIMIT_S) -> Iterator[int]:
    """Hold the lock ``name`` of the cache; gives its descriptor.

    A child that inherits the descriptor keeps the lock while it lives: so the set-up after a killed one waits
    until what that one had started has ended too. Raises :class:`SetupFailed` after ``limit_s``.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupFailed(
            f"the cache folder {folder} cannot be written ({error.strerror}): name another one with INFERQ_CACHE_DIR."
        ) from error
    try:
        _take(fd, name, progress, limit_s)
        yield fd
    finally:
        os.close(fd)


def _take(fd: int, name: str, progress: Progress, limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise
            if time.monotonic() > limit:
                raise SetupFailed(
                    f"another process has been setting up {name} for {limit_s / 60:.0f} minutes."
                ) from error
            progress.detail(f"waiting for another process that sets up {name}")
            time.sleep(_POLL_S)
        else:
            return
