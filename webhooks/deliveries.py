"""Deliveries as they lie in the store: one for each event and each endpoint that wants it.

Whoever saw something end writes ``event`` and the mark; the notifier writes ``state`` and takes the mark away::

    <tenant>/webhooks/<endpoint>/deliveries/<event>/event   WebhookEvent as JSON, the same however often it is written
    <tenant>/webhooks/<endpoint>/deliveries/<event>/state   DeliveryState; none before the first attempt
    sending/<tenant>~<endpoint>~<event>                     an empty object for each that has not been settled
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from queue_schemas import Tenant
from storage.names import ENDPOINT, EVENT, created_ms, folder_of, is_id, tenant_of
from storage.objects import ObjectStore

from .endpoints import Webhooks
from .events import WebhookEvent

_SENDING = "sending"
_FORSAKEN_MS = 7 * 86_400_000
"""So long after its log would be trimmed, what is still pending has been lost sight of: attempts end within days."""


class Outcome(StrEnum):
    """What became of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class Attempt(BaseModel):
    """One attempt that was made. ``status`` is the receiver's HTTP status, None if there was none; then ``error`` says
    why not."""

    model_config = ConfigDict(frozen=True)

    at_ms: int
    took_ms: int
    status: int | None = None
    error: str = ""


class DeliveryState(BaseModel):
    """``tries`` counts attempts begun; those that a crash cut short have left no entry in ``attempts``. While it is
    pending, nothing is sent before ``next_at_ms``."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome = Outcome.PENDING
    tries: int = 0
    next_at_ms: int = 0
    attempts: tuple[Attempt, ...] = ()

    @property
    def settled(self) -> bool:
        return self.outcome is not Outcome.PENDING


@dataclass(frozen=True, slots=True)
class DeliveryKey:
    """Which event, for which endpoint."""

    tenant: Tenant
    endpoint_id: str
    event_id: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as it stands."""

    event: WebhookEvent
    state: DeliveryState


class Deliveries:
    """The deliveries of all tenants. Errors as in :class:`ObjectStore`. Nothing here looks at a clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._webhooks = Webhooks(store)

    def emit(self, event: WebhookEvent) -> int:
        """Have ``event`` sent to every endpoint of its tenant that wants it; how many do.

        Make it before what ended is forgotten, and again after a crash: it is sent as one event.
        """
        wanting = [one for one in self._webhooks.of(Tenant(event.tenant)) if one.wants(event.type)]
        for endpoint in wanting:
            self.ask(DeliveryKey(Tenant(event.tenant), endpoint.record.id, event.id), event)
        return len(wanting)

    def ask(self, key: DeliveryKey, event: WebhookEvent) -> None:
        """Have it sent to one endpoint. Whoever dies midway leaves an event without a mark, never one that is lost
        where the call is made again."""
        self._store.put(self._name(key, "event"), event.model_dump_json().encode())
        if not self.state(key).settled:
            self._store.put(_mark(key), b"")

    def pending(self) -> list[DeliveryKey]:
        """What has not been settled, oldest first; an endpoint or event may be gone."""
        found = []
        for name in self._store.names(_SENDING):
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

    def advance(self, key: DeliveryKey, state: DeliveryState) -> None:
        """Write what became of it; settled, its mark goes. For the notifier alone."""
        self._store.put(self._name(key, "state"), state.model_dump_json().encode())
        if state.settled:
            self.retire(key)

    def retire(self, key: DeliveryKey) -> None:
        """Take the mark away of what is not to be sent any more."""
        self._store.delete([_mark(key)])

    def page(
        self, tenant: Tenant, endpoint_id: str, *, after: str = "", limit: int = 20
    ) -> tuple[list[Delivery], bool]:
        """Up to ``limit`` deliveries, newest first, behind that of the event ``after``, and whether there are more."""
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

    def trim(self, tenant: Tenant, endpoint_id: str, *, before_ms: int, most: int) -> int:
        """Forget what was settled of an endpoint's events from before then, and of all but its newest ``most``; how
        many those are."""
        events = self._events(tenant, endpoint_id)
        surplus, forgotten = len(events) - most, 0
        for rank, event_id in enumerate(events):
            if rank >= surplus and created_ms(event_id) >= before_ms:
                break
            key = DeliveryKey(tenant, endpoint_id, event_id)
            if self.state(key).settled or created_ms(event_id) < before_ms - _FORSAKEN_MS:
                self.drop(key)
                forgotten += 1
        return forgotten

    def drop(self, key: DeliveryKey) -> None:
        """Forget a delivery, sent or not."""
        self.retire(key)
        self._store.delete_below(f"{_folder(key.tenant, key.endpoint_id)}/{key.event_id}")

    def _events(self, tenant: Tenant, endpoint_id: str) -> list[str]:
        return [name for name in self._store.names(_folder(tenant, endpoint_id)) if is_id(name, EVENT)]

    @staticmethod
    def _name(key: DeliveryKey, part: str) -> str:
        return f"{_folder(key.tenant, key.endpoint_id)}/{key.event_id}/{part}"


def _folder(tenant: Tenant, endpoint_id: str) -> str:
    return Webhooks.name(tenant, endpoint_id, "deliveries")


def _mark(key: DeliveryKey) -> str:
    return f"{_SENDING}/{folder_of(key.tenant)}~{key.endpoint_id}~{key.event_id}"
