"""Claim due deliveries and record their results in the file store, for the dispatcher. All calls block.

A claim is part of the delivery's state in the store. It expires with the time limit of its attempt, so that a delivery
whose process died is attempted again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from queue_schemas import InferqError, Tenant
from storage import ObjectStore, created_ms
from telemetry import get_logger

from .core import begin, give_up, max_tries
from .deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from .delivery_store import DeliveryStore
from .endpoints import Disabled, Endpoint, EndpointStore, Secrets
from .events import WebhookEvent
from .metrics import NotifierMetrics
from .settings import NotifierSettings

CLAIM_MARGIN_MS = 2_000
"""How much longer a claim lasts than its attempt may take: time to record the result."""
_RETRY_S = 10
_DAY_MS = 86_400_000
_ORPHAN_AGE_MS = 3_600_000
"""Age at which deliveries of no endpoint are removed."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A delivery that this process may attempt now, with what the attempt needs."""

    key: DeliveryKey
    event: WebhookEvent
    endpoint: Endpoint
    secrets: Secrets
    state: DeliveryState


class DeliveryClaims:
    """All methods but :meth:`claim` raise ``StoreUnavailable`` or ``StoreFull``."""

    def __init__(
        self, store: ObjectStore, settings: NotifierSettings, metrics: NotifierMetrics, now_ms: Callable[[], int]
    ) -> None:
        self._deliveries = DeliveryStore(store)
        self._endpoints = EndpointStore(store)
        self._settings = settings
        self._metrics = metrics
        self._now_ms = now_ms

    def pending(self) -> list[DeliveryKey]:
        """Deliveries that are not settled, oldest first."""
        return self._deliveries.pending()

    def claim(self, key: DeliveryKey) -> tuple[int | None, ClaimedDelivery | None]:
        """When to look at the delivery again, in Unix ms (None: never), and the delivery if it is to be attempted
        now."""
        try:
            return self._claim(key)
        except (InferqError, ValueError) as error:  # the store is unavailable, or its data of this delivery is damaged
            log.warning("webhook_not_claimed", event_id=key.event_id, error=str(error), retry_in_s=_RETRY_S)
            return self._now_ms() + _RETRY_S * 1000, None

    def _claim(self, key: DeliveryKey) -> tuple[int | None, ClaimedDelivery | None]:
        now_ms = self._now_ms()
        state = self._deliveries.state(key)
        if state.settled:  # the event was emitted again, or a process died between its two writes
            self._deliveries.unmark(key)
            return None, None
        if state.next_at_ms > now_ms:
            return state.next_at_ms, None
        endpoint = self._endpoints.get(key.tenant, key.endpoint_id)
        event = self._deliveries.event(key)
        keys = self._endpoints.secrets(key.tenant, key.endpoint_id)
        if endpoint is None or event is None or keys is None:
            self._deliveries.delete(key)
            return None, None
        if not endpoint.active:
            self.abandon(key, "the endpoint is disabled")
            return None, None
        if state.tries >= max_tries(once=event.once):
            self.abandon(key, "the last attempt was cut short")
            return None, None
        begun = begin(state, now_ms, self._settings.attempt_timeout_ms + CLAIM_MARGIN_MS)
        self._deliveries.set_state(key, begun)
        return begun.next_at_ms, ClaimedDelivery(key, event, endpoint, keys, begun)

    def record(self, key: DeliveryKey, attempt: Attempt, state: DeliveryState) -> None:
        """Record the result of an attempt: the delivery's new ``state``, and whether its endpoint is to be disabled."""
        endpoint = self._endpoints.get(key.tenant, key.endpoint_id)
        if endpoint is None:  # deleted meanwhile
            self._deliveries.delete(key)
            return
        reason = self._why_disable(endpoint, attempt, state)
        if reason:
            self._metrics.disabled.inc()
            self._endpoints.disable(key.tenant, key.endpoint_id, Disabled(reason=reason, at_ms=attempt.at_ms))
            log.warning("webhook_endpoint_disabled", endpoint_id=key.endpoint_id, tenant=key.tenant, reason=reason)
        self._deliveries.set_state(key, state)

    def abandon(self, key: DeliveryKey, why: str) -> None:
        """Give a delivery up without another attempt."""
        note = Attempt(at_ms=self._now_ms(), took_ms=0, error=f"not sent: {why}")
        self._deliveries.set_state(key, give_up(self._deliveries.state(key), note))
        self._metrics.given_up.inc()

    def trim(self) -> None:
        """Delete deliveries that are too old, too many, or of no endpoint."""
        before_ms = self._now_ms() - self._settings.keep_days * _DAY_MS
        for tenant, endpoint_id in self._endpoints.all_ids():
            young = created_ms(endpoint_id) > self._now_ms() - _ORPHAN_AGE_MS
            if not young and self._endpoints.get(tenant, endpoint_id) is None:
                self._endpoints.delete(tenant, endpoint_id)  # its creation or deletion was cut short
                continue
            self._deliveries.trim(tenant, endpoint_id, before_ms=before_ms, max_count=self._settings.keep_deliveries)

    def _why_disable(self, endpoint: Endpoint, attempt: Attempt, state: DeliveryState) -> str:
        """Why to disable the endpoint; empty: leave it enabled."""
        record, days = endpoint.record, self._settings.disable_after_days
        tenant = Tenant(record.tenant)
        if state.outcome is Outcome.DELIVERED:
            self._endpoints.clear_failing(tenant, record.id)
            return ""
        if attempt.status == HTTPStatus.GONE:
            return "it answered HTTP 410 (Gone)"
        since_ms = max(self._endpoints.mark_failing(tenant, record.id, attempt.at_ms), record.enabled_at_ms)
        too_long = days and attempt.at_ms - since_ms > days * _DAY_MS
        return f"every delivery failed for {days} days" if too_long and state.settled else ""
