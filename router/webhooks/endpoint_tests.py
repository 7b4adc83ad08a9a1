"""Sends a sample event to a webhook endpoint and waits for its outcome, for ``POST .../test``.

The notifier sends it, in another process, and writes the outcome to the store, where this polls for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from queue_schemas import BadRequest, NoNotifier, OverCapacity, Tenant
from webhooks.deliveries import DeliveryKey
from webhooks.delivery_store import DeliveryStore

from ..idempotency import RequestKey
from ..store import AsyncStore
from .service import WebhookService

_TIMEOUT_S = 15.0
_POLL_INTERVAL_S = 0.2
_MAX_CONCURRENT = 4
"""Tests of one tenant at the same time: each polls the store while it waits."""


class EndpointTests:
    """The tests that one Router runs."""

    def __init__(self, store: AsyncStore, deliveries: DeliveryStore, webhooks: WebhookService) -> None:
        self._store = store
        self._deliveries = deliveries
        self._webhooks = webhooks
        self._running: Counter[Tenant] = Counter()

    async def run(self, tenant: Tenant, endpoint_id: str, event_type: str, key: RequestKey, now_s: float) -> int:
        """The HTTP status with which the endpoint answered.

        Raises ``OverCapacity``, ``NotFound``, ``Conflict`` for an endpoint that is disabled, ``BadRequest`` if it did
        not answer, and ``NoNotifier`` if nobody sent the sample in time; then nobody will.
        """
        if self._running[tenant] >= _MAX_CONCURRENT:
            raise OverCapacity(f"{_MAX_CONCURRENT} tests of this API key run now: wait for one", retry_after_s=1)
        self._running[tenant] += 1
        try:
            delivery = await self._store.run(
                lambda: self._webhooks.request_test(tenant, endpoint_id, event_type, key, now_s), tenant=tenant
            )
            return await self._outcome(delivery)
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    async def _outcome(self, key: DeliveryKey) -> int:
        deliveries = self._deliveries
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                while not (found := await self._store.run(lambda: deliveries.state(key))).settled:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_INTERVAL_S)
        except TimeoutError:
            await self._store.run(lambda: deliveries.delete(key))
            raise NoNotifier(
                f"nothing sent the test within {_TIMEOUT_S:g} s: is an `inferq notifier` running, with this store?",
                retry_after_s=5,
            ) from None
        attempt = found.attempts[-1]
        if attempt.status is None:
            raise BadRequest(f"the endpoint did not answer the test: {attempt.error}", param="url")
        return attempt.status
