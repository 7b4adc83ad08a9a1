"""The dispatcher: begins what is due, and notes what became of it.

One call of :meth:`Dispatcher.deliver` is one RQ job: it begins attempts for a while and does not wait for slow ones,
which run on behind it. RQ runs one such job at a time, so each delivery is claimed by one process
(:mod:`.delivery_store`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from queue_schemas import InferqError
from queue_schemas.headers import retry_after_s
from storage import ObjectStore, created_ms
from telemetry import get_logger

from .core import conclude, next_turns, signed_headers
from .deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from .delivery_store import CLAIM_MARGIN_MS, DeliveryStore, DueDelivery
from .metrics import NotifierMetrics
from .sender import Sender
from .settings import NotifierSettings

STORE_THREADS = 16
_PAUSE_S = 0.25
_Answer = TypeVar("_Answer")

log = get_logger(__name__)


class Dispatcher:
    """``async with dispatcher.running(): await dispatcher.deliver(2.0)``. For one event loop."""

    def __init__(
        self,
        store: ObjectStore,
        sender: Sender,
        settings: NotifierSettings,
        metrics: NotifierMetrics,
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = DeliveryStore(store, settings, metrics, self._now_ms)
        self._sender = sender
        self._settings = settings
        self._metrics = metrics
        self._now_s = now_s
        self._next_at_ms: dict[DeliveryKey, int] = {}
        """When each pending delivery is due, as far as this process knows: its state in the store decides."""
        self._running: dict[DeliveryKey, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="file store")
        metrics.watch(
            pending=lambda: len(self._next_at_ms), oldest_s=self._oldest_s, running=lambda: len(self._running)
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Attempts run within; at its end they get their time limit to finish."""
        try:
            yield
        finally:
            left = list(self._running.values())
            if left:
                limit_s = (self._settings.attempt_limit_ms + CLAIM_MARGIN_MS) / 1000
                _, late = await asyncio.wait(left, timeout=limit_s)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
            self._threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True
        self._changed.set()

    async def deliver(self, window_s: float) -> int:
        """Begin what is due, for ``window_s`` or until nothing more is; how many attempts were begun.

        Raises ``StoreUnavailable`` if the store cannot be read.
        """
        loop = asyncio.get_running_loop()
        end_s, begun = loop.time() + window_s, 0
        await self.look()
        while True:
            self._changed.clear()
            due = self._turns()
            claims = await asyncio.gather(*(self._in_thread(partial(self._ledger.claim, key)) for key in due))
            for key, (next_at_ms, claimed) in zip(due, claims, strict=True):
                self._remember(key, next_at_ms)
                if claimed is not None:
                    begun += 1
                    self._running[key] = loop.create_task(self._attempt(claimed), name=f"webhook {key.event_id}")
            if loop.time() >= end_s or not self._running or self._stopping:
                return begun
            try:
                async with asyncio.timeout(min(_PAUSE_S, max(0.0, end_s - loop.time()))):
                    await self._changed.wait()
            except TimeoutError:
                await self.look()

    @property
    def due(self) -> bool:
        """Whether there is anything to begin now, as far as this process knows."""
        return bool(self._turns())

    async def tidy(self) -> None:
        """Trim the logs, forget what belongs to no endpoint any more, give up what an endpoint has too much of."""
        await self.look()
        waiting: dict[tuple[str, str], list[DeliveryKey]] = {}
        for key in self._next_at_ms:
            waiting.setdefault((key.tenant, key.endpoint_id), []).append(key)
        for keys in waiting.values():
            for key in keys[: -self._settings.endpoint_pending]:  # oldest first, as they are listed
                if key not in self._running:
                    await self._in_thread(partial(self._ledger.abandon, key, "too many later events wait"))
                    self._remember(key, None)
        await self._in_thread(self._ledger.trim)

    async def look(self) -> None:
        """Find what is pending. What is new may be due; of what is known, the time is known."""
        pending = await self._in_thread(self._ledger.pending)
        self._next_at_ms = {key: self._next_at_ms.get(key, 0) for key in pending}

    def _turns(self) -> list[DeliveryKey]:
        if self._stopping:
            return []
        return next_turns(self._next_at_ms, self._running, self._now_ms(), self._settings.limits)

    async def _attempt(self, due: DueDelivery) -> None:
        key = due.key
        try:
            self._remember(key, await self._send(due))
        except InferqError as error:
            # Its claim ends by itself, and then it is sent again: that is what receivers know the id for.
            log.warning("webhook_result_not_written", event_id=key.event_id, error=error.message)
        except Exception:
            log.exception("webhook_attempt_broke", event_id=key.event_id)  # as above; its tries are counted, and end
        finally:
            del self._running[key]
            self._changed.set()

    async def _send(self, due: DueDelivery) -> int | None:
        """Make the attempt; when the next one is due."""
        key, at_ms = due.key, self._now_ms()
        body = due.event.body()
        headers = signed_headers(key.event_id, at_ms // 1000, body, due.secrets.in_force(at_ms))
        answer = await self._sender.send(due.endpoint.record.url, headers, body)
        attempt = Attempt(at_ms=at_ms, took_ms=answer.took_ms, status=answer.status, error=answer.error)
        asked_s = retry_after_s(answer.retry_after, self._now_s()) if answer.status in {429, 503} else None
        state = conclude(due.state, attempt, once=due.event.once, draw=random.random(), asked_s=asked_s)
        self._count(attempt, state)
        log.info(
            "webhook_sent",
            event_id=key.event_id,
            endpoint_id=key.endpoint_id,
            status=answer.status,
            error=answer.error,
            took_ms=answer.took_ms,
            outcome=state.outcome,
        )
        await self._in_thread(partial(self._ledger.note, due.key, attempt, state))
        return None if state.settled else state.next_at_ms

    def _count(self, attempt: Attempt, state: DeliveryState) -> None:
        self._metrics.seconds.observe(attempt.took_ms / 1000)
        (self._metrics.delivered if state.outcome is Outcome.DELIVERED else self._metrics.failed).inc()
        if state.outcome is Outcome.GIVEN_UP:
            self._metrics.given_up.inc()

    def _remember(self, key: DeliveryKey, next_at_ms: int | None) -> None:
        if next_at_ms is None:
            self._next_at_ms.pop(key, None)
        else:
            self._next_at_ms[key] = next_at_ms

    def _oldest_s(self) -> float:
        oldest = min((key.event_id for key in self._next_at_ms), default="")
        return max(0.0, self._now_s() - created_ms(oldest) / 1000) if oldest else 0.0

    async def _in_thread(self, work: Callable[[], _Answer]) -> _Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _now_ms(self) -> int:
        return int(self._now_s() * 1000)
