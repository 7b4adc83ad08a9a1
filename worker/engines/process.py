"""Supervise an engine as a subprocess: start it on a free port, watch it, restart it with back-off, end it with us.

The process runs in a group of its own under :mod:`worker.engines.guard`, so that nothing of it is left when this
worker ends, by SIGKILL or otherwise. It gets no ``INFERQ_*`` variable: some are secrets, and its code needs none. Its
output goes to a log file and, the last lines of it, into errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from queue_schemas import EngineFailed, EngineState
from queue_schemas.fleet.model_cards import Card
from scheduling.slots import EngineLoad
from telemetry import get_logger
from telemetry.backoff import Backoff
from telemetry.environment import foreign_environment, free_port
from telemetry.redaction import redact_arguments

from . import guard
from .dialects import VLLM
from .http import HttpEngine
from .log_tail import LogTail
from .port import EngineAnswer, EngineCall

HOST = "127.0.0.1"
_POLL_S = 0.1
_REFRESH_S = 5.0
_BACKOFF = Backoff(1.0, 60.0, jitter=0)
_REPORTED_LINES = 12

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start an engine: the command and what is added to the environment (where not set there already)."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


class ProcessEngine:
    """Supervises one engine process. ``launches[model](port)`` gives the command for a port, again for each start: that
    of the first model, or of the one that :meth:`switch` names.

    ``ready_timeout_s`` bounds a start: an engine that is not ready by then is FAILED, ended and started again, as is
    one that exits. The pause before a restart doubles from 1 s to 60 s while it fails again and again, which ``detail``
    says; after it was ready for ``stable_after_s`` the pauses start over. The time that it takes to load does not
    count: else an engine that crashes at its first request every time would never be restarted any slower.
    ``log_file`` gets the process's output.
    """

    dialect = VLLM
    """Of whatever a worker starts: vLLM, or the simulated engine, which has its ways."""

    def __init__(
        self,
        name: str,
        launches: Mapping[str, Callable[[int], Launch]],
        *,
        ready_timeout_s: float,
        stable_after_s: float,
        log_file: Path | None = None,
        stop_timeout_s: float = 10.0,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.state = EngineState.STARTING
        self.detail = f"{name} has not been started yet"
        self.models: tuple[str, ...] = ()
        self.loadable = tuple(launches) if len(launches) > 1 else ()
        """The models of which it serves one at a time; empty: it cannot load another one."""
        self.loaded = next(iter(launches))
        """The model that it serves or starts with."""
        self.port = 0
        self.failures = 0
        self.log = LogTail(log_file)
        self._launches = launches
        self._switched = asyncio.Event()
        self._ready_timeout_s = ready_timeout_s
        self._stable_after_s = stable_after_s
        self._stop_timeout_s = stop_timeout_s
        self._restarted = restarted
        self._process: Process | None = None
        self._ready_at: float | None = None
        self._last_failure = ""
        self._http = HttpEngine(f"http://{HOST}:0", dialect=self.dialect)
        self._changed: Callable[[], None] = lambda: None

    @property
    def cards(self) -> Mapping[str, Card]:
        """What the engine says of its models; nothing while it starts."""
        return self._http.cards

    @property
    def pid(self) -> int | None:
        """The id of the process group's leader; None while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def switch(self, model: str) -> None:
        """End the process, whatever it does, and start one with ``model``. Until that is ready it serves none."""
        self.loaded, self.models, self.failures = model, (), 0
        self._become(EngineState.STARTING, f"{self.name} is ended, to be started with {model}")
        self._switched.set()

    async def run(self, changed: Callable[[], None]) -> None:
        """Keep one process running until cancelled. It ends before one with another model starts, which needs the
        accelerator's memory."""
        self._changed = changed
        while True:
            self._switched.clear()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(self._keep_running(), name="engine process")
                await self._switched.wait()
                running.cancel()

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._run_once()
            except EngineFailed as error:
                if self._switched.is_set():
                    return  # it failed while it was ended
                self._note_stability()
                self.failures += 1
                self._last_failure = error.message
                pause = _BACKOFF.pause_s(self.failures)
                again = f"starting it again in {pause:.0f} s{self._in_a_row()}"
                self._become(EngineState.FAILED, f"{error.message}; {again}")
                log.error(
                    "engine_failed",
                    engine=self.name,
                    error=error.message,
                    restart_in_s=pause,
                    failures_in_a_row=self.failures,
                )
                await asyncio.sleep(pause)
            self._restarted()

    def _note_stability(self) -> None:
        """An engine that has been ready for long has its failures behind it."""
        if self._ready_at is not None and asyncio.get_running_loop().time() - self._ready_at > self._stable_after_s:
            self.failures = 0

    def _in_a_row(self) -> str:
        return f" (it failed {self.failures} times in a row)" if self.failures > 1 else ""

    def call(self, call: EngineCall) -> AbstractAsyncContextManager[EngineAnswer]:
        return self._http.call(call)

    async def progress(self) -> int | None:
        return await self._http.progress() if self.state is EngineState.READY else None

    async def load(self) -> EngineLoad | None:
        return await self._http.load() if self.state is EngineState.READY else None

    async def load_adapter(self, name: str, path: str) -> None:
        http = self._ready_http()
        await http.load_adapter(name, path)
        self._take_models(http)

    async def unload_adapter(self, name: str) -> None:
        http = self._ready_http()
        await http.unload_adapter(name)
        self._take_models(http)

    def _ready_http(self) -> HttpEngine:
        if self.state is not EngineState.READY:
            raise EngineFailed(f"{self.detail}: try again")
        return self._http

    def _take_models(self, http: HttpEngine) -> None:
        if http is self._http:  # else the process was started anew meanwhile, without adapters
            self.models = http.models

    async def stop(self, limit_s: float) -> None:
        """SIGTERM to the process, SIGKILL to its whole group when the limit is over."""
        await self._end(limit_s)
        self.log.close()

    async def _run_once(self) -> None:
        """One run of the process: start it, and watch it until it fails. Always raises ``EngineFailed``."""
        self.port = free_port(HOST)
        self._ready_at = None
        launch = self._launches[self.loaded](self.port)
        before = f"; before, {self._last_failure}{self._in_a_row()}" if self.failures else ""
        self._become(EngineState.STARTING, f"{self.name} is starting on port {self.port}{before}")
        command = " ".join(redact_arguments(launch.command))
        log.info("engine_starting", engine=self.name, command=command, log_file=str(self.log.path))
        self._http = HttpEngine(f"http://{HOST}:{self.port}", dialect=self.dialect)
        try:
            async with self._started(launch) as process, asyncio.TaskGroup() as group:
                group.create_task(self._watch_exit(process), name="engine exit")
                group.create_task(self._watch_health(), name="engine health")
        except BaseExceptionGroup as failures:
            failed, others = failures.split(EngineFailed)
            if failed is None or others is not None:
                raise
            raise _first(failed) from None
        finally:
            await self._http.stop(0)

    @contextlib.asynccontextmanager
    async def _started(self, launch: Launch) -> AsyncIterator[Process]:
        """The process, ended with all of its group when this is left."""
        # Pipes of our own: asyncio's make ``wait`` wait for every process that inherited them.
        lifeline_end, lifeline = os.pipe()
        output, output_end = os.pipe()
        try:
            try:
                # In a group of its own, away from our terminal: Ctrl-C is for the worker, which then drains.
                self._process = process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", guard.__file__, str(self._stop_timeout_s), *launch.command,
                    stdin=lifeline_end, stdout=output_end, stderr=output_end, start_new_session=True,
                    env={**launch.environment, **foreign_environment()},
                )  # fmt: skip
            finally:
                os.close(lifeline_end)
                os.close(output_end)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: _Output(self.log), os.fdopen(output, "rb", buffering=0)
            )
            try:
                yield process
            finally:
                await asyncio.shield(self._end(self._stop_timeout_s))
                transport.close()
        finally:
            os.close(lifeline)

    async def _watch_exit(self, process: Process) -> None:
        code = await process.wait()
        if self.state is EngineState.READY:
            # At once: every job claimed from here on would spend an attempt on an engine that is not there.
            self._become(EngineState.FAILED, f"{self.name} ended with exit code {code}")
        await asyncio.sleep(_POLL_S)  # for the last output of the process
        raise EngineFailed(f"{self.name} ended with exit code {code}{self._last_output()}")

    async def _watch_health(self) -> None:
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                await self._until_up()
                models = await self._http.list_models()
                await self._http.load()  # before it has work: whether it tells any
        except TimeoutError as error:
            raise EngineFailed(
                f"{self.name} was not ready within {self._ready_timeout_s:.0f} s{self._last_output()}"
            ) from error
        self.models = models
        self._ready_at = asyncio.get_running_loop().time()
        self._become(EngineState.READY, "")
        log.info("engine_ready", engine=self.name, port=self.port, models=models)
        while True:
            await asyncio.sleep(_REFRESH_S)
            self._note_stability()
            # A busy engine may be late with this; its health is shown by its process and its output.
            with contextlib.suppress(TimeoutError, EngineFailed):
                cards = self.cards
                models = await self._http.list_models()
                if models and (models != self.models or cards != self.cards):
                    self.models = models
                    self._changed()

    async def _until_up(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError, EngineFailed):
                if await self._http.answers_well():
                    return
            await asyncio.sleep(_POLL_S)

    async def _end(self, limit_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await process.wait()
        # Also when the leader is gone: what it left behind must not hold the accelerator.
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()

    def _become(self, state: EngineState, detail: str) -> None:
        self.state, self.detail = state, detail[:2_000]
        self._changed()

    def _last_output(self) -> str:
        lines = self.log.last(_REPORTED_LINES)
        where = f" (all of it in {self.log.path})" if self.log.path else ""
        return f"; its last lines{where}:\n" + "\n".join(lines) if lines else f"; it wrote nothing{where}"


class _Output(asyncio.Protocol):
    def __init__(self, log_tail: LogTail) -> None:
        self._log = log_tail

    def data_received(self, data: bytes) -> None:
        self._log.write(data)


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _first(failures: BaseExceptionGroup[EngineFailed]) -> EngineFailed:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, EngineFailed)  # noqa: S101 - what the group was split by
    return error
