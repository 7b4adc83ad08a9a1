"""Webhooks in tests: put endpoints and events into a store as the other roles do, and run a notifier on it."""

from __future__ import annotations

import time
from pathlib import Path

from queue_schemas import Tenant
from storage import ObjectStore, StorageSettings
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import WebhookEvent

from .fleet import Fleet, Role

ACME = Tenant("acme")
_NOTIFIER = {
    "scan_interval_ms": 50,
    "attempt_timeout_ms": 1_000,
    "lock_ttl_ms": 3_000,
    "webhooks_allow_http": True,
    "webhooks_allow_private": "127.0.0.0/8",
}
"""Settings in tests, as flags; a test may give others."""


class WebhookStorage:
    """The store of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ObjectStore.open(StorageSettings(url=str(folder)))
        self.webhooks = EndpointStore(self.store)
        self.deliveries = DeliveryStore(self.store)

    def endpoint(self, url: str, *, tenant: Tenant = ACME) -> str:
        """An endpoint for all events; its id."""
        now_ms = int(time.time() * 1000)
        record = EndpointRecord(
            id=new_endpoint_id(now_ms),
            tenant=tenant,
            url=url,
            events=("*",),
            created_at=now_ms // 1000,
            updated_at=now_ms // 1000,
            enabled_at_ms=now_ms,
        )
        self.webhooks.create(record, Secrets.fresh(now_ms))
        return record.id

    def emit(self, name: str, tenant: Tenant = ACME) -> str:
        """A batch of that name ended; its event's id."""
        event = WebhookEvent.of(tenant, "batch.completed", name, int(time.time()))
        assert self.deliveries.emit(event) > 0
        return event.id

    def outcomes(self, endpoint_id: str, tenant: Tenant = ACME) -> list[str]:
        """What became of each delivery."""
        page, _ = self.deliveries.page(tenant, endpoint_id, limit=1_000)
        return [one.state.outcome.value for one in page]


def add_notifier(fleet: Fleet, folder: Path, name: str = "notifier", **flags: object) -> Role:
    """A notifier's process over the store in ``folder``, not started yet."""
    settings = _NOTIFIER | {"notifier_id": name, "redis_url": fleet.server.url, "storage_url": folder} | flags
    return fleet.add(name, "webhooks.service", settings)
