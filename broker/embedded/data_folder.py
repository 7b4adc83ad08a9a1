"""The embedded server's data folder: locks it for one owner, protects its files, and remembers port and password."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from queue_schemas import CannotStart
from telemetry.files import write_private

MAX_LOG_BYTES = 10 * 1024 * 1024
"""A log that has grown past this is set aside at the next start, one older part kept."""

_CURES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another data folder",
    errno.EACCES: "it is not writable: choose another data folder, or correct its owner and mode",
    errno.EPERM: "it is not writable: choose another data folder, or correct its owner and mode",
    errno.ENOTDIR: "its path leads through a file: choose another data folder",
    errno.EEXIST: "it is a file: choose another data folder",
}


class DataFolder:
    """``path`` (0700) holds ``aof/`` (the data, 0700), ``valkey.conf`` and ``password`` (0600), ``port``, ``lock`` and
    ``valkey.log``. Methods raise ``OSError``, of which :meth:`problem` makes a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.password = ""
        self.log_path = path / "valkey.log"
        self._lock_fd: int | None = None

    @property
    def owned(self) -> bool:
        """Whether this object holds the folder's lock."""
        return self._lock_fd is not None

    @property
    def in_use(self) -> bool:
        """Whether somebody owns the folder now."""
        try:
            os.close(_lock(self.path))
        except CannotStart:
            return True
        except OSError:
            return False
        return False

    def acquire(self) -> None:
        """Make the folder, or take the one that is there; read its password, or make one.

        Raises ``CannotStart`` naming the process that owns the folder, if another one does.
        """
        for folder in (self.path, self.path / "aof"):
            _make_private(folder)
        self._lock_fd = _lock(self.path)
        file = self.path / "password"
        if not file.exists() or not file.read_text().strip():
            write_private(file, secrets.token_urlsafe(32))
        self.password = file.read_text().strip()
        if self.log_path.exists() and self.log_path.stat().st_size > MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))

    def release(self) -> None:
        """Give the lock back."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def last_port(self) -> int:
        """The port of last time; 0 if there was none."""
        try:
            port = int((self.path / "port").read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return port if 0 < port < 65_536 else 0

    def last_password(self) -> str:
        """The password of the folder's server; empty if there was none."""
        try:
            return (self.path / "password").read_text().strip()
        except FileNotFoundError:
            return ""

    def remember_port(self, port: int) -> None:
        """For :meth:`last_port` of the next owner."""
        write_private(self.path / "port", str(port))

    def write_config(self, host: str, port: int, max_memory_bytes: int) -> Path:
        """The server's configuration file; the password stands in it, not on a command line for all to see."""
        lines = [
            f"bind {host}",
            f"port {port}",
            "protected-mode yes",
            f"requirepass {self.password}",
            "daemonize no",
            f"dir {_quoted(self.path / 'aof')}",
            'logfile ""',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            f"maxmemory {max_memory_bytes}",
            "maxmemory-policy noeviction",
            "always-show-logo no",
            "set-proc-title no",
        ]
        file = self.path / "valkey.conf"
        write_private(file, "\n".join(lines) + "\n")
        return file

    def open_log(self) -> BinaryIO:
        """The log, to append to."""
        return self.log_path.open("ab")

    def last_words(self, since: int) -> str:
        """The last lines that the log holds behind byte ``since``."""
        with self.log_path.open("rb") as file:
            file.seek(since)
            lines = file.read(65_536).decode("utf-8", "replace").splitlines()
        return " | ".join(line.split(" # ")[-1].strip() for line in lines[-3:] if line.strip()) or "no output"

    def problem(self, error: OSError) -> str:
        """What is wrong with the folder, and how to correct it."""
        cure = _CURES.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
        return f"the embedded queue server cannot use the folder {self.path}: {cure}"


def _lock(path: Path) -> int:
    """Take the folder's lock. The descriptor is not inherited, so the lock ends with the owner, however it ends."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
    except OSError as error:
        owner = os.pread(fd, 20, 0).decode("ascii", "replace") or "unknown"
        os.close(fd)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise CannotStart(
            f"{path} is in use by process {owner}: stop that one, or give this one a data folder of its own"
        ) from error
    return fd


def _make_private(folder: Path) -> None:
    """Make ``folder`` for its owner only, as the server's files, which hold every tenant's prompts, are readable by
    any user who reaches them. One that is there is closed to others too, unless it belongs to another user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        folder.chmod(0o700)


def _quoted(path: Path) -> str:
    """``path`` as an argument in a Redis configuration file."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
