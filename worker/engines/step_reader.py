"""Read the running streams of an engine together, once for each of its steps.

An engine that batches writes one token to every stream, then works on the next: what belongs to a step arrives within a
few milliseconds, stream by stream. To wake, read and send for each of them costs several times what all of them cost
together. So the sockets of streams that have begun are watched as one: when the first has something to read, the reader
waits for the others, reads all that are ready, and has it sent on at once. What waits meanwhile waits in the kernel,
and slows the engine by TCP.

The wait ends as soon as every stream has something to read, when none joined within a tick, or after ``max_wait_s``. A
lone stream never waits; a stream that stands still costs its neighbours a tick in each step.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

TICK_S = 0.001
"""The finest grain of uvloop's timers."""


class StepReader:
    """Reads sockets in steps. ``flush`` sends on what was read; nothing more is read until it returns.

    It needs Linux's epoll: elsewhere, and once :meth:`run` has ended, it is not open.
    """

    def __init__(self, flush: Callable[[], Awaitable[None]], *, max_wait_s: float) -> None:
        self.is_flushing = False
        """Whether nothing is read because what was read before has not been sent yet."""
        self._flush = flush
        self._max_wait_s = max_wait_s
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") else None
        self._reads: dict[int, Callable[[], None]] = {}

    @property
    def is_open(self) -> bool:
        """Whether streams can be read."""
        return self._epoll is not None and not self._epoll.closed

    def add(self, fd: int, read: Callable[[], None]) -> None:
        """Call ``read`` in each step in which ``fd`` has something to read, or has ended. It must not raise."""
        self._epoll.register(fd, select.EPOLLIN)
        self._reads[fd] = read

    def remove(self, fd: int) -> None:
        """Read ``fd`` no more; while it is open still."""
        if self._reads.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> NoReturn:
        """Read until cancelled."""
        if self._epoll is None:
            await asyncio.get_running_loop().create_future()  # nothing is ever added
        try:
            while True:
                await self._read_one_step()
        finally:
            self._reads.clear()
            self._epoll.close()

    async def _read_one_step(self) -> None:
        await self._readable()
        for fd, _ in await self._step():
            read = self._reads.get(fd)
            if read is not None:
                read()
        self.is_flushing = True
        await self._flush()
        self.is_flushing = False

    async def _readable(self) -> None:
        """Wait until a stream has something to read."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()

        def wake() -> None:
            loop.remove_reader(self._epoll)
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(self._epoll, wake)
        try:
            await readable
        finally:
            loop.remove_reader(self._epoll)

    async def _step(self) -> Sequence[tuple[int, int]]:
        """The streams that have something to read, once the step is over."""
        now = asyncio.get_running_loop().time
        until, before = now() + self._max_wait_s, 0
        ready = self._poll()
        while before < len(ready) < len(self._reads) and now() < until:
            before = len(ready)
            await asyncio.sleep(TICK_S)
            ready = self._poll()
        return ready

    def _poll(self) -> Sequence[tuple[int, int]]:
        ready: Sequence[tuple[int, int]] = self._epoll.poll(0, max(len(self._reads), 1))
        return ready
