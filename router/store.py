"""The file store as a Router's loop may use it: its calls block, so they run in threads of their own.

A store that hangs takes these threads and nothing else: inference goes on, and whoever wants a file is told.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from queue_schemas import InferqError, OverCapacity, StoreUnavailable, Tenant
from storage import Batches, Files, ObjectStore, RequestRecords
from telemetry import get_logger
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import EndpointStore

WAITING_PER_THREAD = 16
"""How many calls may wait for each thread; beyond it they are refused."""
MAX_PAGES_WAITING = 16
"""How many pages of lists may wait for a tenant's turn; beyond it they are refused."""
RETRY_AFTER_S = 5
_Answer = TypeVar("_Answer")

log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Call(Generic[_Answer]):
    work: Callable[[], _Answer]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[_Answer] | None
    """None: nobody waits."""
    undo: Callable[[], object] | None = None
    tenant: Tenant | None = None
    """Whose share of all calls it takes."""


@dataclass(slots=True)
class _Turn:
    """Whose page of one tenant is read, and how many are being read or wait."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0


class Store:
    """``await store.run(lambda: store.files.get(...))``. For one event loop."""

    def __init__(self, objects: ObjectStore, *, threads: int = 16, limit_s: float = 20.0, alone: bool = False) -> None:
        """``alone``: there is but one tenant, to which all belongs."""
        self.objects = objects
        self.files = Files(objects)
        self.batches = Batches(objects)
        self.webhooks = EndpointStore(objects)
        self.deliveries = DeliveryStore(objects)
        self.requests = RequestRecords(objects)
        self._limit_s = limit_s
        self._max_threads = threads
        self._max_open = threads * WAITING_PER_THREAD
        self._max_of_tenant = self._max_open if alone else self._max_open // 4
        self._open_of: Counter[Tenant] = Counter()
        self._threads = 0
        self._page_turns: dict[Tenant, _Turn] = {}
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._idle = asyncio.Event()
        self.open = 0
        """Calls that have not ended, those that nobody waits for any more included."""

    async def run(
        self,
        work: Callable[[], _Answer],
        *,
        limit_s: float | None = None,
        undo: Callable[[], object] | None = None,
        tenant: Tenant | None = None,
    ) -> _Answer:
        """What ``work`` answers or raises, done in a thread.

        Raises ``StoreUnavailable`` when it takes longer than the limit, or when too many calls wait already. A call
        cannot be broken off: if whoever waits gives up, ``undo`` is run (in a thread) once it has ended.

        ``tenant``: who asked for it. Raises ``OverCapacity`` if too many of its calls have not ended: one tenant's
        never are all that there may be.
        """
        if self.open >= self._max_open:
            raise StoreUnavailable(
                "the file store has more to do than it gets done; try again shortly", retry_after_s=RETRY_AFTER_S
            )
        if tenant is not None and self._open_of.get(tenant, 0) >= self._max_of_tenant:
            raise OverCapacity(
                f"{self._max_of_tenant} of your requests wait for the file store: try again shortly",
                retry_after_s=RETRY_AFTER_S,
            )
        limit_s = self._limit_s if limit_s is None else limit_s
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()
        self._hand_over(_Call(work, loop, answer, undo, tenant))
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            raise StoreUnavailable(
                f"the file store did not answer within {limit_s:g} s; try again", retry_after_s=RETRY_AFTER_S
            ) from None

    async def read_page(self, tenant: Tenant, work: Callable[[], _Answer]) -> _Answer:
        """:meth:`run` for a page of a tenant's list, which reads many objects: one at a time of each tenant, so that
        those of one neither fill the threads nor keep the loop from its turn.

        Raises ``OverCapacity`` where too many of the tenant's wait already, or one has waited for the limit.
        """
        turn = self._page_turns.setdefault(tenant, _Turn())
        if turn.wanted > MAX_PAGES_WAITING:
            raise _too_many_pages()
        turn.wanted += 1
        try:
            try:
                async with asyncio.timeout(self._limit_s):
                    await turn.lock.acquire()
            except TimeoutError:
                raise _too_many_pages() from None
            try:
                return await self.run(work, tenant=tenant)
            finally:
                turn.lock.release()
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._page_turns[tenant]

    def later(self, work: Callable[[], object]) -> None:
        """Do ``work`` in a thread; nobody waits for it. For clearing up, which may fail: then it is logged."""
        self._hand_over(_Call(work, asyncio.get_running_loop(), None))

    async def close(self, limit_s: float) -> None:
        """Let what is under way come to its end, for ``limit_s`` at most."""
        try:
            async with asyncio.timeout(limit_s):
                while self.open:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("store_calls_left", calls=self.open)
        for _ in range(self._threads):
            self._calls.put(None)
        self._threads = 0

    def _hand_over(self, call: _Call[Any]) -> None:
        self.open += 1
        if call.tenant is not None:
            self._open_of[call.tenant] += 1
        self._calls.put(call)
        if self._threads < min(self.open, self._max_threads):
            self._threads += 1
            # A daemon: a store that hangs must not keep the process from ending.
            threading.Thread(target=self._work, name="file store", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            answer, error = None, None
            if call.answer is None or not call.answer.done():
                try:
                    answer = call.work()
                except BaseException as caught:  # noqa: BLE001 - raised where it is waited for
                    error = caught
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                call.loop.call_soon_threadsafe(self._ended, call, answer, error)

    def _ended(self, call: _Call[Any], answer: object, error: BaseException | None) -> None:
        self.open -= 1
        if call.tenant is not None:
            self._open_of[call.tenant] -= 1
            if not self._open_of[call.tenant]:
                del self._open_of[call.tenant]
        if not self.open:
            self._idle.set()
        if call.answer is not None and not call.answer.done():
            if error is None:
                call.answer.set_result(answer)
            else:
                call.answer.set_exception(error)
            return
        if error is not None:
            reason = error.message if isinstance(error, InferqError) else repr(error)
            log.warning("store_call_failed", error=reason, then="nobody waited for it")
        if call.undo is not None:
            self.later(call.undo)


def _too_many_pages() -> OverCapacity:
    return OverCapacity(
        f"{MAX_PAGES_WAITING} of your pages of lists wait for another one to be read: ask for one after another",
        retry_after_s=RETRY_AFTER_S,
    )
