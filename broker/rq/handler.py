"""Run RQ's jobs, blocking functions named in Redis, as coroutines on the event loop of the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from queue_schemas import BrokerUnavailable, CannotStart


class JobHandler:
    """Connects one job function to the coroutine that does its work; one for each function, at module level."""

    def __init__(self, advice: str, limit_s: float) -> None:
        """``advice`` is the error of a job that runs in another process: what to start instead."""
        self._advice = advice
        self._limit_s = limit_s
        self._handler: Callable[..., Coroutine[Any, Any, str]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve(self, handler: Callable[..., Coroutine[Any, Any, str]] | None) -> None:
        """From now on, run ``handler`` on the event loop of the caller; None: refuse jobs."""
        self._handler = handler
        self._loop = None if handler is None else asyncio.get_running_loop()

    def call(self, *args: str) -> str:
        """Run the handler; what it answers. Blocks. Raises ``BrokerUnavailable`` if it exceeds its limit."""
        if self._handler is None or self._loop is None:
            raise CannotStart(self._advice)
        running = asyncio.run_coroutine_threadsafe(self._handler(*args), self._loop)
        try:
            return running.result(self._limit_s)
        except FutureTimeoutError:
            running.cancel()
            raise BrokerUnavailable(f"the job did not end within {self._limit_s:g} s") from None
