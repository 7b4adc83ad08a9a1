"""Run blocking calls in daemon threads, for asyncio services: ``await in_thread(lambda: store.get(name))``.

Unlike :func:`asyncio.to_thread`, a call that hangs (a file store, a name server) does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

MAX_THREADS = 32
_Result = TypeVar("_Result")


class DaemonThreads:
    """Up to ``max_threads`` daemon threads, started when first needed. Usable from any thread and event loop."""

    def __init__(self, name: str, max_threads: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = self._threads = 0

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """What ``work``, run in a thread, returns or raises. Cancelled, it does not wait for ``work`` to end."""
        result: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        context = contextvars.copy_context()
        self.submit(lambda: _call(context, work, result))
        return await result

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call``, which must not raise, in a thread, without waiting for it."""
        with self._lock:
            self._open += 1
            new = self._threads < min(self._open, self._max_threads)
            self._threads += new
        self._calls.put(call)
        if new:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def close(self) -> None:
        """End the threads, once the calls so far have run."""
        with self._lock:
            ending, self._threads = self._threads, 0
        for _ in range(ending):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
            with self._lock:
                self._open -= 1


def _call(context: contextvars.Context, work: Callable[[], _Result], result: asyncio.Future[_Result]) -> None:
    if result.cancelled():
        return
    value, error = None, None
    try:
        value = context.run(work)
    except BaseException as caught:  # noqa: BLE001 - raised where it is awaited
        error = caught
    with suppress(RuntimeError):  # the loop has ended, and nothing awaits the result
        result.get_loop().call_soon_threadsafe(_settle, result, value, error)


def _settle(result: asyncio.Future[Any], value: object, error: BaseException | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


_shared = DaemonThreads("blocking call", MAX_THREADS)


async def in_thread(work: Callable[[], _Result]) -> _Result:
    """What ``work``, run in one of the process's shared threads, returns or raises."""
    return await _shared.run(work)
