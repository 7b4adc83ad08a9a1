"""Store the deliveries of webhooks, one for each event and each endpoint subscribed to it, in the file store.

The process that saw something end writes ``event`` and the pending mark; the notifier writes ``state`` and removes the
mark::

    <tenant>/webhooks/<endpoint>/deliveries/<event>/event   WebhookEvent as JSON; writing it again changes nothing
    <tenant>/webhooks/<endpoint>/deliveries/<event>/state   DeliveryState as JSON; absent before the first attempt
    sending/<tenant>~<endpoint>~<event>                     the pending mark, an empty object; absent once settled
"""

from __future__ import annotations

from queue_schemas import Tenant
from storage import ObjectStore, created_ms, folder_of, tenant_of
from storage.names import is_id

from .deliveries import Delivery, DeliveryKey, DeliveryState
from .endpoints import ENDPOINT, EndpointStore
from .events import EVENT, WebhookEvent

_PENDING = "sending"
_ABANDONED_MS = 7 * 86_400_000
"""A delivery that is still pending so long after its log would be trimmed is abandoned: attempts end within days."""


class DeliveryStore:
    """The deliveries of all tenants. Errors as in :class:`ObjectStore`. Reads no clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._endpoints = EndpointStore(store)

    def emit(self, event: WebhookEvent) -> int:
        """Queue ``event`` for every subscribed endpoint of its tenant; how many there are.

        Call it before what ended is forgotten, and again after a crash: receivers see one event.
        """
        subscribed = [one for one in self._endpoints.of(Tenant(event.tenant)) if one.subscribes_to(event.type)]
        for endpoint in subscribed:
            self.add(DeliveryKey(Tenant(event.tenant), endpoint.record.id, event.id), event)
        return len(subscribed)

    def add(self, key: DeliveryKey, event: WebhookEvent) -> None:
        """Queue ``event`` for one endpoint. A crash midway leaves an event without a mark; calling it again mends
        that."""
        self._store.put(self._name(key, "event"), event.model_dump_json().encode())
        if not self.state(key).settled:
            self._store.put(_mark(key), b"")

    def pending(self) -> list[DeliveryKey]:
        """Deliveries that are not settled, oldest first; the endpoint or event of one may be gone."""
        found = []
        for name in self._store.names(_PENDING):
            folder, endpoint_id, event_id = (["", "", *name.rsplit("~", 2)])[-3:]
            if is_id(endpoint_id, ENDPOINT) and is_id(event_id, EVENT):
                found.append(DeliveryKey(tenant_of(folder), endpoint_id, event_id))
        return sorted(found, key=lambda key: key.event_id)

    def event(self, key: DeliveryKey) -> WebhookEvent | None:
        found = self._store.get(self._name(key, "event"))
        return None if found is None else WebhookEvent.model_validate_json(found)

    def state(self, key: DeliveryKey) -> DeliveryState:
        found = self._store.get(self._name(key, "state"))
        return DeliveryState() if found is None else DeliveryState.model_validate_json(found)

    def set_state(self, key: DeliveryKey, state: DeliveryState) -> None:
        """Write the state; a settled delivery loses its mark. Only the notifier calls this."""
        self._store.put(self._name(key, "state"), state.model_dump_json().encode())
        if state.settled:
            self.unmark(key)

    def unmark(self, key: DeliveryKey) -> None:
        """Remove the pending mark: nothing more is sent."""
        self._store.delete([_mark(key)])

    def page(
        self, tenant: Tenant, endpoint_id: str, *, after: str = "", limit: int = 20
    ) -> tuple[list[Delivery], bool]:
        """Up to ``limit`` deliveries, newest first, that follow the event ``after``, and whether there are more."""
        page: list[Delivery] = []
        for event_id in reversed(self._events(tenant, endpoint_id)):
            if after and event_id >= after:
                continue
            if len(page) == limit:
                return page, True
            key = DeliveryKey(tenant, endpoint_id, event_id)
            event = self.event(key)
            if event is not None:
                page.append(Delivery(event, self.state(key)))
        return page, False

    def trim(self, tenant: Tenant, endpoint_id: str, *, before_ms: int, max_count: int) -> int:
        """Delete settled deliveries of events from before ``before_ms``, and all but the newest ``max_count``; how many
        were deleted."""
        events = self._events(tenant, endpoint_id)
        surplus, deleted = len(events) - max_count, 0
        for rank, event_id in enumerate(events):
            if rank >= surplus and created_ms(event_id) >= before_ms:
                break
            key = DeliveryKey(tenant, endpoint_id, event_id)
            if self.state(key).settled or created_ms(event_id) < before_ms - _ABANDONED_MS:
                self.delete(key)
                deleted += 1
        return deleted

    def delete(self, key: DeliveryKey) -> None:
        """Delete a delivery, sent or not."""
        self.unmark(key)
        self._store.delete_below(f"{_folder(key.tenant, key.endpoint_id)}/{key.event_id}")

    def _events(self, tenant: Tenant, endpoint_id: str) -> list[str]:
        return [name for name in self._store.names(_folder(tenant, endpoint_id)) if is_id(name, EVENT)]

    @staticmethod
    def _name(key: DeliveryKey, part: str) -> str:
        return f"{_folder(key.tenant, key.endpoint_id)}/{key.event_id}/{part}"


def _folder(tenant: Tenant, endpoint_id: str) -> str:
    return EndpointStore.name(tenant, endpoint_id, "deliveries")


def _mark(key: DeliveryKey) -> str:
    return f"{_PENDING}/{folder_of(key.tenant)}~{key.endpoint_id}~{key.event_id}"
