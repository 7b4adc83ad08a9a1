"""Creates, changes, lists and deletes webhook endpoints in the store; the notifier sends to them."""

from __future__ import annotations

from queue_schemas import Conflict, NotFound, OverCapacity, Tenant
from telemetry import get_logger
from webhooks.deliveries import Delivery, DeliveryKey
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import Endpoint, EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import WebhookEvent

from ..idempotency import Execution, Idempotency, RequestKey
from .schemas import EndpointChange, EndpointCreate

log = get_logger(__name__)


class WebhookService:
    """The endpoints of all tenants. All methods block: call them in threads. All but ``create`` and ``page`` raise
    ``NotFound`` for an endpoint that is not the tenant's."""

    def __init__(
        self, endpoints: EndpointStore, deliveries: DeliveryStore, max_endpoints: int, idempotency: Idempotency
    ) -> None:
        self._idempotency = idempotency
        self._endpoints = endpoints
        self._deliveries = deliveries
        self._max_endpoints = max_endpoints

    def create(
        self, tenant: Tenant, params: EndpointCreate, key: RequestKey, now_s: float
    ) -> tuple[Endpoint, Secrets | None, Execution]:
        """A new endpoint, or the one that an earlier try of the same request made.

        Raises ``OverCapacity``, and ``IdempotencyKeyReused`` for a key that was sent with another request.
        """
        now_ms, now = int(now_s * 1000), int(now_s)
        execution = self._idempotency.begin(
            tenant, key, "create endpoint", params.model_dump(), new_endpoint_id(now_ms), now_ms
        )
        before = None if execution.is_first else self._endpoints.get(tenant, execution.result)
        if before is not None:
            return before, self._endpoints.secrets(tenant, before.record.id), execution
        count = len(self._endpoints.of(tenant))
        if count >= self._max_endpoints:
            self._idempotency.abandon(execution)
            raise OverCapacity(f"you have {count} webhook endpoints, the most there may be: delete one")
        secrets = Secrets.fresh(now_ms)
        record = EndpointRecord(
            id=execution.result,
            tenant=tenant,
            url=params.url,
            events=tuple(params.event_types),
            name=params.name or "",
            created_at=now,
            updated_at=now,
            enabled_at_ms=now_ms,
        )
        self._endpoints.create(record, secrets)
        log.info("webhook_endpoint_created", endpoint_id=record.id, tenant=tenant)
        return Endpoint(record, None), secrets, execution

    def get(self, tenant: Tenant, endpoint_id: str) -> tuple[Endpoint, Secrets | None]:
        found = self._endpoints.get(tenant, endpoint_id)
        if found is None:
            why = f"no webhook endpoint {endpoint_id[:80]!r} found for this API key"
            raise NotFound(why, param="webhook_endpoint_id")
        return found, self._endpoints.secrets(tenant, endpoint_id)

    def page(self, tenant: Tenant, after: str, limit: int) -> tuple[list[tuple[Endpoint, Secrets | None]], bool]:
        """Newest first, behind the one called ``after``."""
        there = [one for one in reversed(self._endpoints.of(tenant)) if not after or one.record.id < after]
        page = [(one, self._endpoints.secrets(tenant, one.record.id)) for one in there[:limit]]
        return page, len(there) > limit

    def change(
        self, tenant: Tenant, endpoint_id: str, params: EndpointChange, now_s: float
    ) -> tuple[Endpoint, Secrets | None]:
        """Change what ``params`` name, and nothing else."""
        endpoint, secrets = self.get(tenant, endpoint_id)
        events = None if params.event_types is None else tuple(params.event_types)
        new = {"url": params.url, "events": events, "name": params.name}
        changes: dict[str, object] = {name: value for name, value in new.items() if value is not None}
        if params.enabled is not None:
            changes["paused"] = not params.enabled
            if params.enabled and endpoint.disabled is not None:
                # Later than that by any clock: the notifier's may be ahead of ours.
                changes["enabled_at_ms"] = max(int(now_s * 1000), endpoint.disabled.at_ms + 1)
        record = endpoint.record.model_copy(update=changes)
        if record == endpoint.record:
            return endpoint, secrets
        self._endpoints.update(record.model_copy(update={"updated_at": int(now_s)}))
        log.info("webhook_endpoint_changed", endpoint_id=endpoint_id, tenant=tenant, fields=sorted(changes))
        return self.get(tenant, endpoint_id)

    def rotate(
        self, tenant: Tenant, endpoint_id: str, keep_s: int, key: RequestKey, now_s: float
    ) -> tuple[Endpoint, Secrets | None, Execution]:
        """Sign with a new secret; the old one stays valid for ``keep_s``. A repetition of a request returns the secret
        that the first try made.

        Raises ``Conflict`` if that secret was replaced since, and ``IdempotencyKeyReused`` for a key that was sent with
        another request.
        """
        endpoint, secrets = self.get(tenant, endpoint_id)
        now_ms = int(now_s * 1000)
        new = Secrets.fresh(now_ms) if secrets is None else secrets.rotated(now_ms, keep_s * 1000)
        execution = self._idempotency.begin(
            tenant, key, "rotate secret", [endpoint_id, keep_s], new.fingerprint, now_ms
        )
        if not execution.is_first:
            if secrets is not None and secrets.fingerprint == execution.result:
                return endpoint, secrets, execution
            if secrets is not None and secrets.made_at_ms >= execution.record.created_ms:
                raise Conflict(
                    "the secret that this request made was replaced by a later rotation: rotate again, as a new request"
                )
            execution = self._idempotency.repeat(execution, new.fingerprint)  # the first try did not get so far
        self._endpoints.rotate(tenant, endpoint_id, new)
        self._endpoints.update(endpoint.record.model_copy(update={"updated_at": int(now_s)}))
        log.info("webhook_secret_rotated", endpoint_id=endpoint_id, tenant=tenant, keep_s=keep_s)
        return self.get(tenant, endpoint_id)[0], new, execution

    def delete(self, tenant: Tenant, endpoint_id: str) -> None:
        self.get(tenant, endpoint_id)
        self._endpoints.delete(tenant, endpoint_id)
        log.info("webhook_endpoint_deleted", endpoint_id=endpoint_id, tenant=tenant)

    def deliveries(self, tenant: Tenant, endpoint_id: str, after: str, limit: int) -> tuple[list[Delivery], bool]:
        """What was sent to it, newest first."""
        self.get(tenant, endpoint_id)
        return self._deliveries.page(tenant, endpoint_id, after=after, limit=limit)

    def request_test(
        self, tenant: Tenant, endpoint_id: str, event_type: str, key: RequestKey, now_s: float
    ) -> DeliveryKey:
        """Have a sample event sent, once for one key. Raises ``Conflict`` for an endpoint that is disabled."""
        endpoint, _ = self.get(tenant, endpoint_id)
        now_ms = int(now_s * 1000)
        event = WebhookEvent.sample(tenant, event_type, now_ms)
        execution = None
        if key.value:
            execution = self._idempotency.begin(
                tenant, key, "test endpoint", [endpoint_id, event_type], event.id, now_ms
            )
            event = event.model_copy(update={"id": execution.result})
        delivery = DeliveryKey(tenant, endpoint_id, event.id)
        if execution is not None and not execution.is_first and self._deliveries.event(delivery) is not None:
            return delivery
        if not endpoint.active:
            if execution is not None:
                self._idempotency.abandon(execution)
            raise Conflict('the endpoint is disabled: enable it with {"enabled": true} first')
        self._deliveries.add(delivery, event)
        return delivery
