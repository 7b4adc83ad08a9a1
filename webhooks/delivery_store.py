"""What is written down about deliveries: claimed before an attempt, noted behind it, forgotten in the end. All blocks.

A delivery is claimed by one process, in its state in the store; the claim ends with the time limit of its attempt,
whatever became of whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from queue_schemas import InferqError, Tenant
from storage import ObjectStore, created_ms
from telemetry import get_logger

from .core import begin, give_up, max_tries
from .deliveries import Attempt, Deliveries, DeliveryKey, DeliveryState, Outcome
from .endpoints import Disabled, Endpoint, Secrets, Webhooks
from .events import WebhookEvent
from .metrics import NotifierMetrics
from .settings import NotifierSettings

CLAIM_MARGIN_MS = 2_000
"""How much longer a claim lasts than its attempt may take: for writing down what became of it."""
_AFTER_TROUBLE_S = 10
_DAY_MS = 86_400_000
_LEFTOVER_MS = 3_600_000
"""How old what belongs to no endpoint is before it is removed."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery that was claimed, and what its attempt needs."""

    key: DeliveryKey
    event: WebhookEvent
    endpoint: Endpoint
    secrets: Secrets
    state: DeliveryState


class DeliveryStore:
    """All methods but :meth:`claim` raise ``StoreUnavailable`` or ``StoreFull``."""

    def __init__(
        self, store: ObjectStore, settings: NotifierSettings, metrics: NotifierMetrics, now_ms: Callable[[], int]
    ) -> None:
        self._deliveries = Deliveries(store)
        self._webhooks = Webhooks(store)
        self._settings = settings
        self._metrics = metrics
        self._now_ms = now_ms

    def pending(self) -> list[DeliveryKey]:
        """What has not been settled, oldest first."""
        return self._deliveries.pending()

    def claim(self, key: DeliveryKey) -> tuple[int | None, DueDelivery | None]:
        """When it is next to be looked at (None: never), and the due, if it is to be run now."""
        try:
            return self._claim(key)
        except (InferqError, ValueError) as error:  # the store is away, or what it has of this one is damaged
            log.warning("webhook_not_claimed", event_id=key.event_id, error=str(error), again_in_s=_AFTER_TROUBLE_S)
            return self._now_ms() + _AFTER_TROUBLE_S * 1000, None

    def _claim(self, key: DeliveryKey) -> tuple[int | None, DueDelivery | None]:
        now_ms = self._now_ms()
        state = self._deliveries.state(key)
        if state.settled:  # marked again by whoever saw the end twice, or killed between the two writes
            self._deliveries.retire(key)
            return None, None
        if state.next_at_ms > now_ms:
            return state.next_at_ms, None
        endpoint = self._webhooks.get(key.tenant, key.endpoint_id)
        event = self._deliveries.event(key)
        keys = self._webhooks.secrets(key.tenant, key.endpoint_id)
        if endpoint is None or event is None or keys is None:
            self._deliveries.drop(key)
            return None, None
        if not endpoint.active:
            self.abandon(key, "the endpoint is disabled")
            return None, None
        if state.tries >= max_tries(once=event.once):
            self.abandon(key, "its attempts were cut short, the last one too")
            return None, None
        begun = begin(state, now_ms, self._settings.attempt_limit_ms + CLAIM_MARGIN_MS)
        self._deliveries.advance(key, begun)
        return begun.next_at_ms, DueDelivery(key, event, endpoint, keys, begun)

    def note(self, key: DeliveryKey, attempt: Attempt, state: DeliveryState) -> None:
        """Write down what became of an attempt: the delivery's new ``state``, and what it says about its endpoint."""
        endpoint = self._webhooks.get(key.tenant, key.endpoint_id)
        if endpoint is None:  # deleted meanwhile: leave nothing of it
            self._deliveries.drop(key)
            return
        reason = self._why_disable(endpoint, attempt, state)
        if reason:
            self._metrics.disabled.inc()
            self._webhooks.disable(key.tenant, key.endpoint_id, Disabled(reason=reason, at_ms=attempt.at_ms))
            log.warning("webhook_endpoint_disabled", endpoint_id=key.endpoint_id, tenant=key.tenant, why=reason)
        self._deliveries.advance(key, state)

    def abandon(self, key: DeliveryKey, why: str) -> None:
        """Give a delivery up."""
        note = Attempt(at_ms=self._now_ms(), took_ms=0, error=f"not sent: {why}")
        self._deliveries.advance(key, give_up(self._deliveries.state(key), note))
        self._metrics.given_up.inc()

    def trim(self) -> None:
        """Forget what is old, or more than is kept, or belongs to no endpoint any more."""
        before_ms = self._now_ms() - self._settings.keep_days * _DAY_MS
        for tenant, endpoint_id in self._webhooks.everyone():
            young = created_ms(endpoint_id) > self._now_ms() - _LEFTOVER_MS
            if not young and self._webhooks.get(tenant, endpoint_id) is None:
                self._webhooks.delete(tenant, endpoint_id)  # whoever deleted or made it was killed midway
                continue
            self._deliveries.trim(tenant, endpoint_id, before_ms=before_ms, most=self._settings.keep_deliveries)

    def _why_disable(self, endpoint: Endpoint, attempt: Attempt, state: DeliveryState) -> str:
        """Why nothing more is to be sent to it; empty: go on."""
        record, days = endpoint.record, self._settings.disable_after_days
        tenant = Tenant(record.tenant)
        if state.outcome is Outcome.DELIVERED:
            self._webhooks.took(tenant, record.id)
            return ""
        if attempt.status == HTTPStatus.GONE:
            return "it answered HTTP 410 (Gone)"
        since_ms = max(self._webhooks.failed(tenant, record.id, attempt.at_ms), record.enabled_at_ms)
        too_long = days and attempt.at_ms - since_ms > days * _DAY_MS
        return f"it took nothing for {days} days" if too_long and state.settled else ""
