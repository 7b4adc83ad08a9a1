"""Runs blocking calls to the file store in threads of their own, for the Router's event loop.

A store that hangs blocks these threads and nothing else: inference goes on, and requests for files get an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from queue_schemas import InferqError, OverCapacity, StoreUnavailable, Tenant
from storage import BatchStore, FileStore, ObjectStore, RequestRecords
from telemetry import get_logger
from telemetry.threads import DaemonThreads
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import EndpointStore

WAITING_PER_THREAD = 16
"""How many calls may wait for each thread; beyond it they are refused."""
MAX_PAGES_WAITING = 16
"""How many pages of lists may wait for a tenant; beyond it they are refused."""
RETRY_AFTER_S = 5
_Result = TypeVar("_Result")

log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Call(Generic[_Result]):
    work: Callable[[], _Result]
    loop: asyncio.AbstractEventLoop
    result: asyncio.Future[_Result] | None
    """None: nobody awaits it."""
    undo: Callable[[], object] | None = None
    tenant: Tenant | None = None
    """Whose share of the calls it counts in."""


@dataclass(slots=True)
class _PageLock:
    """The lock that pages of one tenant take, and how many hold it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class AsyncStore:
    """``await store.run(lambda: store.files.get(...))``. For one event loop."""

    def __init__(
        self, objects: ObjectStore, *, threads: int = 16, timeout_s: float = 20.0, single_tenant: bool = False
    ) -> None:
        """``single_tenant``: everything belongs to one tenant, which needs no share of its own."""
        self.objects = objects
        self.files = FileStore(objects)
        self.batches = BatchStore(objects)
        self.endpoints = EndpointStore(objects)
        self.deliveries = DeliveryStore(objects)
        self.requests = RequestRecords(objects)
        self._timeout_s = timeout_s
        self._max_open = threads * WAITING_PER_THREAD
        self._max_of_tenant = self._max_open if single_tenant else self._max_open // 4
        self._open_of: Counter[Tenant] = Counter()
        # Daemons: a store that hangs must not keep the process from ending.
        self._threads = DaemonThreads("file store", threads)
        self._page_locks: dict[Tenant, _PageLock] = {}
        self._idle = asyncio.Event()
        self.open = 0
        """Calls that have not ended, including those that nobody awaits any more."""

    async def run(
        self,
        work: Callable[[], _Result],
        *,
        timeout_s: float | None = None,
        undo: Callable[[], object] | None = None,
        tenant: Tenant | None = None,
    ) -> _Result:
        """Run ``work`` in a thread; return or raise what it does.

        Raises ``StoreUnavailable`` after ``timeout_s``, or when too many calls wait already. A call cannot be
        interrupted: if its caller gives up, ``undo`` runs (in a thread) once the call has ended.

        ``tenant``: who asked for it. Raises ``OverCapacity`` if too many of its calls have not ended, so that one
        tenant cannot use all of them.
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
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        self._hand_over(_Call(work, loop, future, undo, tenant))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise StoreUnavailable(
                f"the file store did not answer within {timeout_s:g} s; try again", retry_after_s=RETRY_AFTER_S
            ) from None

    async def read_page(self, tenant: Tenant, work: Callable[[], _Result]) -> _Result:
        """:meth:`run` for a page of a tenant's list, which reads many objects: one at a time of each tenant, so that
        those of one neither fill the threads nor keep the loop from its page.

        Raises ``OverCapacity`` where too many of the tenant's wait already, or one has waited for the limit.
        """
        page = self._page_locks.setdefault(tenant, _PageLock())
        if page.users > MAX_PAGES_WAITING:
            raise _too_many_pages()
        page.users += 1
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await page.lock.acquire()
            except TimeoutError:
                raise _too_many_pages() from None
            try:
                return await self.run(work, tenant=tenant)
            finally:
                page.lock.release()
        finally:
            page.users -= 1
            if not page.users:
                del self._page_locks[tenant]

    def in_background(self, work: Callable[[], object]) -> None:
        """Run ``work`` in a thread without waiting for it. For clean-up: a failure is logged."""
        self._hand_over(_Call(work, asyncio.get_running_loop(), None))

    async def close(self, timeout_s: float) -> None:
        """Wait for the calls that run, for ``timeout_s`` at most."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.open:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("store_calls_left", calls=self.open)
        self._threads.close()

    def _hand_over(self, call: _Call[Any]) -> None:
        self.open += 1
        if call.tenant is not None:
            self._open_of[call.tenant] += 1
        self._threads.submit(lambda: self._make(call))

    def _make(self, call: _Call[Any]) -> None:
        """``call``, in a thread."""
        result, error = None, None
        if call.result is None or not call.result.done():
            try:
                result = call.work()
            except BaseException as caught:  # noqa: BLE001 - raised where it is awaited
                error = caught
        with suppress(RuntimeError):  # the loop has ended, and with it who awaited it
            call.loop.call_soon_threadsafe(self._ended, call, result, error)

    def _ended(self, call: _Call[Any], result: object, error: BaseException | None) -> None:
        self.open -= 1
        if call.tenant is not None:
            self._open_of[call.tenant] -= 1
            if not self._open_of[call.tenant]:
                del self._open_of[call.tenant]
        if not self.open:
            self._idle.set()
        if call.result is not None and not call.result.done():
            if error is None:
                call.result.set_result(result)
            else:
                call.result.set_exception(error)
            return
        if error is not None:
            reason = error.message if isinstance(error, InferqError) else repr(error)
            log.warning("store_call_failed", error=reason, then="nobody awaited it")
        if call.undo is not None:
            self.in_background(call.undo)


def _too_many_pages() -> OverCapacity:
    return OverCapacity(
        f"{MAX_PAGES_WAITING} of your pages of lists wait for another one to be read: ask for one after another",
        retry_after_s=RETRY_AFTER_S,
    )
