"""Webhook endpoints as the store has them: made, changed, rotated, listed, removed."""

from __future__ import annotations

from queue_schemas import Conflict, NotFound, OverCapacity, Tenant
from telemetry import get_logger
from webhooks.deliveries import Delivery, DeliveryKey
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import Endpoint, EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import WebhookEvent

from ..idempotency import Claim, Idempotency, Sent
from .rules import EndpointParams

log = get_logger(__name__)


class WebhookService:
    """The endpoints of all tenants. All methods block: they are called in threads. All but ``create`` and ``page``
    raise ``NotFound`` for what is none of the tenant's."""

    def __init__(
        self, webhooks: EndpointStore, deliveries: DeliveryStore, max_endpoints: int, idempotency: Idempotency
    ) -> None:
        self._idempotency = idempotency
        self._webhooks = webhooks
        self._deliveries = deliveries
        self._max_endpoints = max_endpoints

    def create(
        self, tenant: Tenant, asked: EndpointParams, sent: Sent, now_s: float
    ) -> tuple[Endpoint, Secrets | None, Claim]:
        """A new endpoint, or the one that an earlier try of the same request left.

        Raises ``OverCapacity``, and ``IdempotencyKeyReused`` for a key that was sent with another request.
        """
        now_ms, now = int(now_s * 1000), int(now_s)
        claim = self._idempotency.claim(tenant, sent, "create endpoint", asked, new_endpoint_id(now_ms), now_ms)
        before = None if claim.first else self._webhooks.get(tenant, claim.record.result)
        if before is not None:
            return before, self._webhooks.secrets(tenant, before.record.id), claim
        there = len(self._webhooks.of(tenant))
        if there >= self._max_endpoints:
            self._idempotency.release(claim)
            raise OverCapacity(f"you have {there} webhook endpoints, the most there may be: remove one")
        keys = Secrets.fresh(now_ms)
        record = EndpointRecord(
            id=claim.record.result,
            tenant=tenant,
            url=asked.url or "",
            events=asked.events or (),
            name=asked.name or "",
            created_at=now,
            updated_at=now,
            enabled_at_ms=now_ms,
        )
        self._webhooks.create(record, keys)
        log.info("webhook_endpoint_created", endpoint_id=record.id, tenant=tenant)
        return Endpoint(record, None), keys, claim

    def get(self, tenant: Tenant, endpoint_id: str) -> tuple[Endpoint, Secrets | None]:
        found = self._webhooks.get(tenant, endpoint_id)
        if found is None:
            raise NotFound(f"there is no webhook endpoint {endpoint_id[:80]!r} of yours", param="webhook_endpoint_id")
        return found, self._webhooks.secrets(tenant, endpoint_id)

    def page(self, tenant: Tenant, after: str, limit: int) -> tuple[list[tuple[Endpoint, Secrets | None]], bool]:
        """Newest first, behind the one called ``after``."""
        there = [one for one in reversed(self._webhooks.of(tenant)) if not after or one.record.id < after]
        page = [(one, self._webhooks.secrets(tenant, one.record.id)) for one in there[:limit]]
        return page, len(there) > limit

    def change(
        self, tenant: Tenant, endpoint_id: str, asked: EndpointParams, now_s: float
    ) -> tuple[Endpoint, Secrets | None]:
        """Change what is asked, and only that."""
        endpoint, keys = self.get(tenant, endpoint_id)
        new = {"url": asked.url, "events": asked.events, "name": asked.name}
        changes: dict[str, object] = {name: value for name, value in new.items() if value is not None}
        if asked.enabled is not None:
            changes["paused"] = not asked.enabled
            if asked.enabled and endpoint.disabled is not None:
                # Later than that by any clock: the notifier's may be ahead of ours.
                changes["enabled_at_ms"] = max(int(now_s * 1000), endpoint.disabled.at_ms + 1)
        record = endpoint.record.model_copy(update=changes)
        if record == endpoint.record:
            return endpoint, keys
        self._webhooks.update(record.model_copy(update={"updated_at": int(now_s)}))
        log.info("webhook_endpoint_changed", endpoint_id=endpoint_id, tenant=tenant, fields=sorted(changes))
        return self.get(tenant, endpoint_id)

    def rotate(
        self, tenant: Tenant, endpoint_id: str, keep_s: int, sent: Sent, now_s: float
    ) -> tuple[Endpoint, Secrets | None, Claim]:
        """Sign with a fresh secret, beside which the old one is good for ``keep_s``. A repetition of a request gives
        the secret that the first try made.

        Raises ``Conflict`` if that secret was replaced since, and ``IdempotencyKeyReused`` for a key that was sent with
        another request.
        """
        endpoint, keys = self.get(tenant, endpoint_id)
        now_ms = int(now_s * 1000)
        fresh = Secrets.fresh(now_ms) if keys is None else keys.rotated(now_ms, keep_s * 1000)
        claim = self._idempotency.claim(tenant, sent, "rotate secret", [endpoint_id, keep_s], fresh.fingerprint, now_ms)
        if not claim.first:
            if keys is not None and keys.fingerprint == claim.record.result:
                return endpoint, keys, claim
            if keys is not None and keys.made_at_ms >= claim.record.created_ms:
                raise Conflict(
                    "the secret that this request made was replaced by a later rotation: rotate again, as a new request"
                )
            claim = self._idempotency.renew(claim, fresh.fingerprint)  # the first try did not get so far
        self._webhooks.rotate(tenant, endpoint_id, fresh)
        self._webhooks.update(endpoint.record.model_copy(update={"updated_at": int(now_s)}))
        log.info("webhook_secret_rotated", endpoint_id=endpoint_id, tenant=tenant, keep_s=keep_s)
        return self.get(tenant, endpoint_id)[0], fresh, claim

    def delete(self, tenant: Tenant, endpoint_id: str) -> None:
        self.get(tenant, endpoint_id)
        self._webhooks.delete(tenant, endpoint_id)
        log.info("webhook_endpoint_deleted", endpoint_id=endpoint_id, tenant=tenant)

    def deliveries(self, tenant: Tenant, endpoint_id: str, after: str, limit: int) -> tuple[list[Delivery], bool]:
        """What was sent to it, newest first."""
        self.get(tenant, endpoint_id)
        return self._deliveries.page(tenant, endpoint_id, after=after, limit=limit)

    def ask_test(self, tenant: Tenant, endpoint_id: str, event_type: str, sent: Sent, now_s: float) -> DeliveryKey:
        """Have a sample sent, once under one key. Raises ``Conflict`` for an endpoint that is disabled."""
        endpoint, _ = self.get(tenant, endpoint_id)
        now_ms = int(now_s * 1000)
        event = WebhookEvent.sample(tenant, event_type, now_ms)
        if sent.key:
            claim = self._idempotency.claim(tenant, sent, "test endpoint", [endpoint_id, event_type], event.id, now_ms)
            key = DeliveryKey(tenant, endpoint_id, claim.record.result)
            if not claim.first and self._deliveries.event(key) is not None:
                return key
            event = event.model_copy(update={"id": claim.record.result})
        key = DeliveryKey(tenant, endpoint_id, event.id)
        if not endpoint.active:
            if sent.key:
                self._idempotency.release(claim)
            raise Conflict('the endpoint is disabled: enable it with {"enabled": true} first')
        self._deliveries.add(key, event)
        return key
