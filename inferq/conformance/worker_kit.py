"""What rules for workers have at hand: the scripted Router and engine, and the worker's process if it is ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from queue_schemas import CannotStart
from telemetry.environment import free_port

from .scorecard import Broken, NotChecked
from .scripted_engine import ScriptedEngine
from .scripted_queue import Attempt, Job, ScriptedQueue
from .scripted_router import ScriptedRouter

SLOTS = 4
START_LIMIT_S = 60.0
SOON_S = 10.0
"""What a worker that follows the protocol does within a second or two, it does within this on a busy machine."""
STOP_LIMIT_S = 10.0
_KEY_BYTES = 24


class WorkerKit:
    """The surroundings of one worker. ``command`` starts it; without one somebody else does."""

    def __init__(self, command: Sequence[str], log: Path | None = None, patience: float = 1.0) -> None:
        """``patience`` multiplies the limits within which something has to happen."""
        self.patience = patience
        self.command = command
        self.key = secrets.token_urlsafe(_KEY_BYTES)
        self.queue = ScriptedQueue()
        self.router = ScriptedRouter(self.queue, self.key)
        self.engine = ScriptedEngine()
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the worker is told: for one of any make, and for ours."""
        return {
            "ROUTER_URL": self.router.url,
            "ENGINE_URL": self.engine.url,
            "WORKER_KEY": self.key,
            "WORKER_ID": "under-test",
            "WORKER_SLOTS": str(SLOTS),
            "INFERQ_WORKER_MANAGER_URLS": self.router.url,
            "INFERQ_WORKER_ENGINE_URL": self.engine.url,
            "INFERQ_WORKER_KEY": self.key,
            "INFERQ_WORKER_SLOTS": str(SLOTS),
            "INFERQ_WORKER_WORKER_ID": "under-test",
            "INFERQ_WORKER_PORT": str(free_port()),
        }

    @property
    def exit_code(self) -> int | None:
        """That of the worker; None while it runs, and if it is not ours."""
        return None if self._process is None else self._process.returncode

    async def ready(self) -> None:
        """Wait until the worker has joined and waits for work; start it if need be."""
        if self.command and (self._process is None or self._process.returncode is not None):
            await self._start()
        await self.until(lambda: bool(self.queue.claims), "the worker joins, and claims jobs", limit_s=START_LIMIT_S)

    async def run(self, *jobs: Job, limit_s: float = SOON_S) -> list[Attempt]:
        """Put jobs on the queue and wait until the last attempt of each has ended."""
        self.queue.put(*jobs)
        await self.until(lambda: all(_ended(job) for job in jobs), "each job is settled or released", limit_s=limit_s)
        return [job.last for job in jobs]

    async def begun(self, job: Job) -> Attempt:
        """Put a job on the queue, and wait for the first of its output."""
        self.queue.put(job)
        await self.until(lambda: bool(job.attempts and job.last.pieces), "the first piece of a stream arrives")
        return job.last

    async def until(self, holds: Callable[[], bool], what: str, *, limit_s: float = SOON_S) -> None:
        """Wait until ``holds``. Raises ``Broken`` where it does not in time: ``what`` says what should have been."""
        limit_s *= self.patience
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not holds():
                    if self.exit_code is not None:
                        break
                    self.queue.changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await self.queue.changed.wait()
                if holds():
                    return
        ended = "" if self.exit_code is None else f"; the worker has ended with {self.exit_code}"
        raise Broken(f"not within {limit_s:.0f} s: {what}{ended}")

    async def stays(self, holds: Callable[[], bool], what: str, *, for_s: float = 1.0) -> None:
        """Check for a while that ``holds`` goes on. Raises ``Broken`` that says ``what``."""
        until = asyncio.get_running_loop().time() + for_s
        while asyncio.get_running_loop().time() < until:
            if not holds():
                raise Broken(what)
            await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send the worker a signal. Raises ``NotChecked`` if its process is not ours."""
        if self._process is None:
            raise NotChecked("the kit has not started the worker: give its command")
        self._process.send_signal(number)

    async def ended(self, limit_s: float = SOON_S) -> int:
        """The worker's exit code."""
        if self._process is None:
            raise NotChecked("the kit has not started the worker: give its command")
        try:
            async with asyncio.timeout(limit_s * self.patience):
                return await self._process.wait()
        except TimeoutError:
            raise Broken(f"the worker has not ended after {limit_s * self.patience:.0f} s") from None

    async def calm_down(self) -> None:
        """Undo what a rule has set, and let go what it has left."""
        router, queue = self.router, self.queue
        router.faults.clear()
        router.refusals.clear()
        router.lost_leases.clear()
        router.drain, router.bytes_per_s = False, None
        queue.waiting.clear()
        for attempt in queue.by_lease.values():
            if not attempt.ended:
                attempt.answer = "fenced"
                queue.abort(attempt.job)
        self.engine.release.set()
        with contextlib.suppress(Broken):
            await self.until(lambda: self.engine.running == 0, "the engine is idle", limit_s=SOON_S)
        self.engine.release.clear()
        self.engine.calls.clear()
        self.engine.most_running = 0
        router.seen.faults.clear()

    async def kill(self) -> None:
        """End the worker at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def _start(self) -> None:
        self.queue.reset_session()
        self.router.session_id = ""
        output = self._log.open("ab") if self._log is not None else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                env={**os.environ, **self.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise CannotStart(f"the worker's command cannot be started: {error}") from error
        finally:
            if output is not None:
                output.close()


@asynccontextmanager
async def worker_kit(
    command: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    log: Path | None = None,
    patience: float = 1.0,
) -> AsyncIterator[WorkerKit]:
    """The kit, listening. The worker is killed at the end."""
    kit = WorkerKit(command, log, patience)
    await kit.engine.start()
    await kit.router.start(host, port)
    try:
        yield kit
    finally:
        await kit.kill()
        await kit.router.stop()
        await kit.engine.stop()


def _ended(job: Job) -> bool:
    return bool(job.attempts) and job.last.ended
