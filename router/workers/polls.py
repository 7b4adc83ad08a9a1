"""Read control messages for workers that wait over HTTP: one wait for each session and shard, however often it asks.

A read of the queue goes on for a while beyond the call that began it, so that a worker that asks again, because a slot
became free meanwhile, finds it under way: to begin one anew costs a connection.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from queue_schemas import Control, OverCapacity, SessionId

from .rules import WorkerScope

READ_MS = 5_000
"""How long one read of a control stream waits."""
FORGET_S = 60.0
"""How long after its last call a session is forgotten here."""
MAX_SESSIONS = 4_096
"""Sessions that one Router reads for: each has a connection to Redis for each shard."""

Messages = Sequence[tuple[str, Control | None]]
Read = Callable[[int, SessionId, str, int], Awaitable[Messages]]
"""``broker.workers.read_control``."""


class Polls:
    """The waits of the sessions that call this Router, and what is read for them."""

    def __init__(self) -> None:
        self._reads: dict[tuple[int, SessionId], tuple[str, asyncio.Task[Messages]]] = {}
        """By shard and session: behind which message is read, and that."""
        self._waits: dict[tuple[int, SessionId], asyncio.Future[None]] = {}
        self._called_at: dict[SessionId, tuple[float, str]] = {}
        """When each session called last, and the name of its credential."""

    @property
    def waiting(self) -> int:
        """How many calls are held."""
        return len(self._waits)

    def called(self, scope: WorkerScope, session_id: SessionId) -> None:
        """A session calls. Raises ``OverCapacity`` for one more than may."""
        now = asyncio.get_running_loop().time()
        if session_id not in self._called_at:
            of_credential = Counter(name for _, name in self._called_at.values())[scope.name] if scope.name else 0
            # Those of workers that were restarted within the last minute count, too.
            if len(self._called_at) >= MAX_SESSIONS or of_credential >= 4 * scope.workers + 4:
                raise OverCapacity(
                    "more worker sessions call this router than it serves: use another one, or try again later",
                    retry_after_s=30,
                )
        self._called_at[session_id] = (now, scope.name)

    async def messages(self, read: Read, shard: int, session_id: SessionId, after: str, wait_s: float) -> Messages:
        """Control messages behind ``after``, waiting up to ``wait_s`` for one. A later call for the same session and
        shard ends the wait. Raises what ``read`` raises."""
        key, loop = (shard, session_id), asyncio.get_running_loop()
        self._end(key)
        ended = self._waits[key] = loop.create_future()
        until = loop.time() + wait_s
        try:
            while True:
                task = self._reading(read, key, after, wait_s)
                await asyncio.wait({task, ended}, timeout=max(until - loop.time(), 0), return_when="FIRST_COMPLETED")
                if not task.done():
                    return ()
                if self._reads.get(key, ("", None))[1] is task:
                    del self._reads[key]
                if task.cancelled():  # the session has left
                    return ()
                messages = task.result()
                if messages or ended.done() or loop.time() >= until:
                    return messages
        finally:
            if self._waits.get(key) is ended:
                del self._waits[key]

    def end_all(self) -> None:
        """End all waits: their calls are answered."""
        for key in list(self._waits):
            self._end(key)

    def sweep(self) -> list[SessionId]:
        """Forget the sessions that have not called for a minute, and answer them."""
        before = asyncio.get_running_loop().time() - FORGET_S
        gone = [session_id for session_id, (called_at, _) in self._called_at.items() if called_at < before]
        for session_id in gone:
            self.forget(session_id)
        return gone

    def forget(self, session_id: SessionId) -> None:
        """A session calls no more."""
        self._called_at.pop(session_id, None)
        for key in [key for key in self._reads if key[1] == session_id]:
            self._reads.pop(key)[1].cancel()

    def close(self) -> None:
        """End all waits and reads."""
        self.end_all()
        for _, task in self._reads.values():
            task.cancel()
        self._reads.clear()

    def _end(self, key: tuple[int, SessionId]) -> None:
        ended = self._waits.get(key)
        if ended is not None and not ended.done():
            ended.set_result(None)

    def _reading(self, read: Read, key: tuple[int, SessionId], after: str, wait_s: float) -> asyncio.Task[Messages]:
        """The read behind ``after`` that is under way, or a new one."""
        known = self._reads.get(key)
        if known is not None and known[0] == after:
            return known[1]
        if known is not None:
            known[1].cancel()
        task = asyncio.ensure_future(_read(read, key, after, READ_MS if wait_s else 1))
        task.add_done_callback(_seen)
        self._reads[key] = (after, task)
        return task


async def _read(read: Read, key: tuple[int, SessionId], after: str, block_ms: int) -> Messages:
    return await read(*key, after, block_ms)


def _seen(task: asyncio.Task[Messages]) -> None:
    """Marks an error as retrieved: the next call gets it."""
    if not task.cancelled():
        task.exception()
