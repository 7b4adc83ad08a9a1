"""Start the attempts of due deliveries and record their results.

:meth:`Dispatcher.deliver` is the work of one RQ job: it starts attempts for a while and does not wait for slow ones,
which run on after it. RQ runs one such job at a time, so that one process claims each delivery (:mod:`.claims`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from queue_schemas import InferqError
from queue_schemas.headers import retry_after_s
from storage import ObjectStore, created_ms
from telemetry import get_logger
from telemetry.threads import in_thread

from .claims import CLAIM_MARGIN_MS, ClaimedDelivery, DeliveryClaims
from .core import choose_next, conclude, signed_headers
from .deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from .metrics import NotifierMetrics
from .sender import Sender
from .settings import NotifierSettings

_PAUSE_S = 0.25

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
        self._claims = DeliveryClaims(store, settings, metrics, self._now_ms)
        self._sender = sender
        self._settings = settings
        self._metrics = metrics
        self._now_s = now_s
        self._next_at_ms: dict[DeliveryKey, int] = {}
        """When each pending delivery is due, as far as this process knows; its state in the store is authoritative."""
        self._running: dict[DeliveryKey, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        metrics.watch(
            pending=lambda: len(self._next_at_ms), oldest_s=self._oldest_s, running=lambda: len(self._running)
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Attempts run within it; at its end they have their time limit to finish."""
        try:
            yield
        finally:
            left = list(self._running.values())
            if left:
                limit_s = (self._settings.attempt_timeout_ms + CLAIM_MARGIN_MS) / 1000
                _, late = await asyncio.wait(left, timeout=limit_s)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    def stop(self) -> None:
        """Start no more attempts."""
        self._stopping = True
        self._changed.set()

    async def deliver(self, window_s: float) -> int:
        """Start due attempts for ``window_s``, or until none is left; how many were started.

        Raises ``StoreUnavailable`` if the store cannot be read.
        """
        loop = asyncio.get_running_loop()
        end_s, started = loop.time() + window_s, 0
        await self.find_pending()
        while True:
            self._changed.clear()
            due = self._choose()
            claims = await asyncio.gather(*(in_thread(partial(self._claims.claim, key)) for key in due))
            for key, (next_at_ms, claimed) in zip(due, claims, strict=True):
                self._remember(key, next_at_ms)
                if claimed is not None:
                    started += 1
                    self._running[key] = loop.create_task(self._attempt(claimed), name=f"webhook {key.event_id}")
            if loop.time() >= end_s or not self._running or self._stopping:
                return started
            try:
                async with asyncio.timeout(min(_PAUSE_S, max(0.0, end_s - loop.time()))):
                    await self._changed.wait()
            except TimeoutError:
                await self.find_pending()

    @property
    def has_due(self) -> bool:
        """Whether an attempt can be started now, as far as this process knows."""
        return bool(self._choose())

    async def tidy(self) -> None:
        """Trim the delivery logs, and give up the oldest deliveries of endpoints that have too many pending."""
        await self.find_pending()
        waiting: dict[tuple[str, str], list[DeliveryKey]] = {}
        for key in self._next_at_ms:
            waiting.setdefault((key.tenant, key.endpoint_id), []).append(key)
        for keys in waiting.values():
            for key in keys[: -self._settings.max_endpoint_pending]:  # oldest first, as they are listed
                if key not in self._running:
                    await in_thread(partial(self._claims.abandon, key, "too many later events wait"))
                    self._remember(key, None)
        await in_thread(self._claims.trim)

    async def find_pending(self) -> None:
        """List the pending deliveries. A new one may be due at once; of the others the time is known."""
        pending = await in_thread(self._claims.pending)
        self._next_at_ms = {key: self._next_at_ms.get(key, 0) for key in pending}

    def _choose(self) -> list[DeliveryKey]:
        if self._stopping:
            return []
        return choose_next(self._next_at_ms, self._running, self._now_ms(), self._settings.limits)

    async def _attempt(self, claimed: ClaimedDelivery) -> None:
        key = claimed.key
        try:
            self._remember(key, await self._send(claimed))
        except InferqError as error:
            # Its claim expires, and the event is sent again: receivers recognise it by its id.
            log.warning("webhook_result_not_recorded", event_id=key.event_id, error=error.message)
        except Exception:
            log.exception("webhook_attempt_crashed", event_id=key.event_id)  # as above; its tries are limited
        finally:
            del self._running[key]
            self._changed.set()

    async def _send(self, claimed: ClaimedDelivery) -> int | None:
        """Make the attempt; when the next one is due."""
        key, at_ms = claimed.key, self._now_ms()
        body = claimed.event.body()
        headers = signed_headers(key.event_id, at_ms // 1000, body, claimed.secrets.in_force(at_ms))
        answer = await self._sender.send(claimed.endpoint.record.url, headers, body)
        attempt = Attempt(at_ms=at_ms, took_ms=answer.took_ms, status=answer.status, error=answer.error)
        asked_s = retry_after_s(answer.retry_after, self._now_s()) if answer.status in {429, 503} else None
        state = conclude(claimed.state, attempt, once=claimed.event.once, draw=random.random(), asked_s=asked_s)
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
        await in_thread(partial(self._claims.record, key, attempt, state))
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

    def _now_ms(self) -> int:
        return int(self._now_s() * 1000)
