"""One role as a process: started, watched, started again after a pause, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import aiohttp

from queue_schemas import CannotStart
from telemetry.backoff import Restarts

from .logs import RoleLog
from .plan import RoleSpec

_POLL_S = 0.1
_ASK_LIMIT_S = 2.0
_KILL_LIMIT_S = 5.0
_SIGNAL_GAP_S = 0.2
_LAST_WORDS_S = 1.0
_LINE_LIMIT_BYTES = 1 << 20


class RoleProcess:
    """Keeps the process of one :class:`RoleSpec` running. ``tell`` gets sentences for the terminal."""

    def __init__(
        self, spec: RoleSpec, log_dir: Path, environment: Mapping[str, str], tell: Callable[[str, str], None]
    ) -> None:
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self.restarts = 0
        self._environment = environment
        self._tell = tell
        self._process: Process | None = None
        self._ready = False
        self._stopping = False
        self._has_left = False

    @property
    def pid(self) -> int | None:
        """The process's id; None while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Keep the process running until :meth:`stop`, or until it leaves on order (a worker that was
        drained).

        Raises ``CannotStart``, with what the process said last, when it refuses to start or keeps ending.
        """
        history = Restarts()
        with RoleLog(self.log_path, lambda text: self._tell(self.spec.name, text)) as log:
            while not self._stopping:
                began = time.monotonic()
                code = await self._live(log)
                if self._stopping:
                    return
                if code == 0 and self.spec.may_leave:
                    self._has_left = True
                    self._tell(
                        self.spec.name, "was drained on order and stays down; the next `inferq up` starts it again"
                    )
                    return
                history, pause = history.ended(code, time.monotonic() - began, ready=self._ready)
                self._ready = False
                if pause is None:
                    words = log.last_words.removeprefix("inferq: ") or f"it ended with code {code}"
                    raise CannotStart(f"{self.spec.name} cannot be kept running: {words} (its log: {self.log_path})")
                self._tell(self.spec.name, f"ended with code {code}; starting it again in {pause:g} s")
                self.restarts += 1
                await asyncio.sleep(pause)

    async def wait_ready(self, session: aiohttp.ClientSession, waiting_for: Callable[[str], None]) -> None:
        """Return once the role answers /readyz with 200 or has left on order.

        ``waiting_for`` hears what it waits for meanwhile.
        """
        while not (self._ready or self._has_left):
            status, text = await ask(session, f"{self.spec.url}/readyz")
            # Another program on the port must not pass for a role of ours that has ended.
            if status == 200 and self.pid is not None:
                self._ready = True
                return
            waiting_for(text)
            await asyncio.sleep(_POLL_S)

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """SIGTERM, once more when ``hurry`` is set, and SIGKILL for all of its process group after its limit. May be
        repeated."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        hurrying = asyncio.create_task(_hurry(process, hurry)) if hurry is not None else None
        try:
            async with asyncio.timeout(self.spec.stop_limit_s):
                await process.wait()
        except TimeoutError:
            self._tell(self.spec.name, f"did not end within {self.spec.stop_limit_s:g} s and was killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            async with asyncio.timeout(_KILL_LIMIT_S):
                await process.wait()
        finally:
            if hurrying is not None:
                hurrying.cancel()

    async def _live(self, log: RoleLog) -> int:
        """Run the process once; its exit code."""
        process = await asyncio.create_subprocess_exec(
            *tethered(self.spec.command),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env={**self.spec.environment, **self._environment},
            start_new_session=True,
            limit=_LINE_LIMIT_BYTES,
        )
        self._process = process
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(_copy(process.stdout, log), name=f"log of {self.spec.name}")
            code = await process.wait()
            # What it started may still hold the pipe; its own last words are in there by now.
            await asyncio.wait((reading,), timeout=_LAST_WORDS_S)
            reading.cancel()
        return code


def tethered(command: Sequence[str]) -> list[str]:
    """``command`` so that it is killed when this process dies."""
    tether = str(Path(__file__).with_name("tether.py"))
    return [sys.executable, "-I", "-S", tether, str(os.getpid()), *command]


async def _hurry(process: asyncio.subprocess.Process, hurry: asyncio.Event) -> None:
    """The second signal, when it is wanted; a moment after the first, or the kernel might make one of both."""
    await asyncio.sleep(_SIGNAL_GAP_S)
    await hurry.wait()
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)


async def _copy(stream: asyncio.StreamReader, log: RoleLog) -> None:
    async for line in _lines(stream):
        log.write(line)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines until the end; one longer than the limit comes in pieces."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as rest:
            line = rest.partial
        except asyncio.LimitOverrunError as overrun:
            line = await stream.readexactly(overrun.consumed)
        if not line:
            return
        yield line


async def ask(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    """The status and text of ``url``; status 0 if there is no answer."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=_ASK_LIMIT_S)) as answer:
            return answer.status, (await answer.text())[:500]
    except (aiohttp.ClientError, TimeoutError):
        return 0, "starting"
