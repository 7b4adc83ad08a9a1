"""RQ's worker beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import partial

import redis
from rq import Queue

from telemetry import get_logger

from .worker import run_rq_worker

log = get_logger(__name__)


class RqThread:
    """A thread in which RQ's worker runs. For one event loop."""

    def __init__(self, queue: Queue, connection: redis.Redis, name: str) -> None:
        """``connection`` is for this worker alone."""
        self.ended = asyncio.Event()
        """Set when it works no more, asked to or not."""
        self._ending = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._work = partial(run_rq_worker, queue, connection, name, self._ending)

    def start(self) -> None:
        # A daemon: a thread that hangs in a call must not keep the process from ending.
        threading.Thread(target=self._run, name="rq worker", daemon=True).start()

    async def end(self, limit_s: float) -> None:
        """Let the job that runs come to its end, for ``limit_s`` at most."""
        self._ending.set()
        try:
            async with asyncio.timeout(limit_s):
                await self.ended.wait()
        except TimeoutError:
            log.warning("step_cut_short", limit_s=limit_s)

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            log.exception("rq_worker_ended")
        finally:
            with suppress(RuntimeError):  # the loop is gone: nobody waits
                self._loop.call_soon_threadsafe(self.ended.set)
