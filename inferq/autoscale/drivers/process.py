"""Workers as processes of this machine. They outlive the autoscaler; the next one on the same folder adopts them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from inferq.processes import boot_id, start_of
from queue_schemas import CannotStart
from telemetry import get_logger
from telemetry.files import absolute_path, open_log, write_private

from ..settings import AutoscaleSettings
from .port import DriverFailed
from .start_pauses import StartPauses
from .worker_command import id_prefix, pool_name, worker_args, worker_environment

_MAX_LOGS = 20
"""Logs of workers that ended which are kept."""
_TAIL_BYTES = 4_096

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Process:
    """One worker. ``started`` (clock ticks since boot) tells it from a later process of its id."""

    pid: int
    started: int

    @property
    def runs(self) -> bool:
        return start_of(self.pid) == self.started


class ProcessDriver:
    """Starts ``inferq worker`` processes, each on a free port and with a log of its own.

    Their record in the data folder is locked: one autoscaler uses it at a time. A worker that ends is not started again
    under its id: if it is still needed, the autoscaler asks for another. If workers end soon after their start, the
    next start waits, longer each time.
    """

    drains = False
    outdated: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: AutoscaleSettings,
        command: Sequence[str] = (sys.executable, "-m", "inferq", "worker"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``command`` starts one worker. Raises ``CannotStart`` if the folder cannot be used."""
        self._settings = settings
        self._command = command
        self._clock = clock
        self._prefix = id_prefix(settings.pool, socket.gethostname())
        folder = absolute_path(settings.data_dir)
        self._logs = folder / "logs"
        self._record = folder / "autoscale" / f"{pool_name(settings.pool)}.json"
        self._lock = _locked(self._record.with_suffix(".lock"), settings.pool)
        self._count, self._processes = self._adopt()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._started_at: dict[str, float] = {}
        self._kill_at: dict[str, float] = {}
        self._pauses = StartPauses()

    async def workers(self) -> frozenset[str]:
        now = self._clock()
        for worker_id in [worker_id for worker_id, process in self._processes.items() if not process.runs]:
            self._forget(worker_id, now)
        for worker_id, kill_at in self._kill_at.items():
            if now >= kill_at:
                log.warning("worker_killed", worker=worker_id, after_ms=self._settings.stop_timeout)
                _signal(self._processes[worker_id], signal.SIGKILL)
        return frozenset(self._processes)

    async def scale_to(self, count: int) -> None:
        missing = count - len(await self.workers())
        if missing <= 0:
            return
        self._pauses.check(self._clock())
        for _ in range(missing):
            await self._start()

    async def remove(self, worker_ids: Sequence[str]) -> None:
        for worker_id in worker_ids:
            process = self._processes.get(worker_id)
            if process is not None and worker_id not in self._kill_at:
                self._kill_at[worker_id] = self._clock() + self._settings.stop_timeout / 1000
                _signal(process, signal.SIGTERM)

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        return ordered[:count]

    async def close(self) -> None:
        self._lock.close()

    async def _start(self) -> None:
        self._count += 1
        worker_id = f"{self._prefix}-{self._count}"
        args = [*self._command, *worker_args(self._settings, worker_id)]
        try:
            self._tidy_logs()
            with open_log(self._logs / f"{worker_id}.log") as output:
                child = await asyncio.create_subprocess_exec(
                    *args,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=worker_environment(self._settings),
                    start_new_session=True,
                )
        except OSError as error:
            raise DriverFailed(f"a worker cannot be started: {error.strerror or error}") from error
        now = self._clock()
        self._children[worker_id] = child
        self._processes[worker_id] = _Process(child.pid, start_of(child.pid) or 0)
        self._started_at[worker_id] = now
        self._save()
        log.info("worker_started", worker=worker_id, pid=child.pid)

    def _forget(self, worker_id: str, now: float) -> None:
        """A worker has ended. One that failed soon after its start, unasked, makes the next one wait."""
        del self._processes[worker_id]
        asked = self._kill_at.pop(worker_id, None) is not None
        child, began = self._children.pop(worker_id, None), self._started_at.pop(worker_id, None)
        code = child.returncode if child is not None else None
        ran_s = now - began if began is not None else 0.0
        if asked or code == 0:
            self._pauses.ended_well(ran_s)
        else:
            path = self._logs / f"{worker_id}.log"
            self._pauses.failed(now, ran_s, f"{_last_line(path)} ({path})")
        log.info("worker_ended", worker=worker_id, exit_code=code, asked=asked)
        self._save()

    def _adopt(self) -> tuple[int, dict[str, _Process]]:
        try:
            record = json.loads(self._record.read_text())
            count, boot = int(record["count"]), record["boot"]
            found = {
                str(name): _Process(int(one["pid"]), int(one["started"])) for name, one in record["workers"].items()
            }
        except FileNotFoundError:
            return 0, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotStart(
                f"{self._record} cannot be read ({error}): end the workers that it names, then remove it"
            ) from error
        running = {name: process for name, process in found.items() if boot == boot_id() and process.runs}
        if running:
            log.info("workers_adopted", workers=sorted(running))
        return count, running

    def _save(self) -> None:
        workers: Mapping[str, object] = {name: asdict(process) for name, process in self._processes.items()}
        try:
            write_private(self._record, json.dumps({"boot": boot_id(), "count": self._count, "workers": workers}))
        except OSError as error:
            raise DriverFailed(f"{self._record} cannot be written ({error.strerror}): free or fix its disk") from error

    def _tidy_logs(self) -> None:
        logs = sorted(self._logs.glob(f"{self._prefix}-*.log"), key=lambda path: path.stat().st_mtime)
        ended = [path for path in logs if path.stem not in self._processes]
        for path in ended[: max(0, len(ended) - _MAX_LOGS)]:
            path.unlink(missing_ok=True)


def _signal(process: _Process, number: signal.Signals) -> None:
    """To the worker alone, or, if it is to be killed, to all of its process group: it leads one."""
    if process.runs:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number is signal.SIGKILL else os.kill)(process.pid, number)


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("inferq: ") if lines else ""
    return ""


def _locked(path: Path, pool: str) -> BinaryIO:
    """``path``, held by this process until it is closed. Raises ``CannotStart`` if another holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CannotStart(
            f"another autoscaler of this machine runs workers for {pool} from {path.parent}: give another --data-dir"
        ) from error
    except OSError as error:
        raise CannotStart(f"the data folder {path.parent} cannot be used: {error.strerror}") from error
    return file
