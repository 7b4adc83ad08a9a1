"""Store webhook endpoints: the URL, the subscribed events and the signing secrets of each.

Each object has one writer. The Router writes ``endpoint`` and ``secrets``, the notifier ``disabled`` and ``failing``::

    <tenant>/webhooks/<id>/endpoint   EndpointRecord as JSON; written last, so that an endpoint is complete or absent
    <tenant>/webhooks/<id>/secrets    Secrets as JSON; in a folder, only the files' owner can read it
    <tenant>/webhooks/<id>/disabled   Disabled as JSON; in force until the Router enables the endpoint at a later time
    <tenant>/webhooks/<id>/failing    Unix ms, as text, of the first failure in a row; absent while deliveries succeed
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from queue_schemas import Tenant
from storage import ObjectStore, folder_of, tenant_of
from storage.names import is_id, is_tenant_folder, new_id
from telemetry import get_logger

from .events import ALL_EVENTS

ENDPOINT = "we_"
"""Prefix of endpoint ids."""
SECRET_BYTES = 32
MAX_EARLIER = 3
_PREFIX = "whsec_"

log = get_logger(__name__)


def new_endpoint_id(now_ms: int) -> str:
    """A fresh endpoint id; ids sort by time."""
    return new_id(ENDPOINT, now_ms)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class EndpointRecord(_Record):
    """Where to send which events. ``events`` may be ``*`` alone. ``*_at`` are Unix seconds; ``enabled_at_ms`` is when
    the endpoint was last created or enabled; ``paused``: its owner disabled it."""

    id: str
    tenant: str
    url: str
    events: tuple[str, ...]
    name: str = ""
    created_at: int
    updated_at: int
    enabled_at_ms: int
    paused: bool = False


class EarlierSecret(_Record):
    """A secret that was replaced but still signs until ``until_ms``."""

    secret: str = Field(repr=False)
    until_ms: int


class Secrets(_Record):
    """The signing secret, created at ``made_at_ms``, and the latest earlier ones while receivers change over."""

    current: str = Field(repr=False)
    made_at_ms: int
    earlier: tuple[EarlierSecret, ...] = ()

    @classmethod
    def fresh(cls, now_ms: int) -> Self:
        secret = _PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
        return cls(current=secret, made_at_ms=now_ms)

    def rotated(self, now_ms: int, grace_ms: int) -> Self:
        """A fresh secret. This one stays valid for ``grace_ms``, earlier ones for no longer; with a grace of 0 only the
        fresh one is valid."""
        until_ms = now_ms + grace_ms
        old = [EarlierSecret(secret=self.current, until_ms=until_ms)]
        old += [one.model_copy(update={"until_ms": min(one.until_ms, until_ms)}) for one in self.earlier]
        kept = tuple(one for one in old[:MAX_EARLIER] if one.until_ms > now_ms)
        return self.fresh(now_ms).model_copy(update={"earlier": kept})

    def in_force(self, now_ms: int) -> list[bytes]:
        """The keys to sign with now, the current one first."""
        old = [one.secret for one in self.earlier if now_ms < one.until_ms]
        return [base64.b64decode(secret.removeprefix(_PREFIX)) for secret in (self.current, *old)]

    @property
    def fingerprint(self) -> str:
        """Identifies the current secret without revealing it."""
        return hashlib.sha256(self.current.encode()).hexdigest()

    @property
    def hint(self) -> str:
        """The part of the current secret that may be shown, so that its owner recognises it."""
        return f"{_PREFIX}...{self.current[-4:]}"


class Disabled(_Record):
    """Why and when the notifier disabled an endpoint."""

    reason: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint in its current state. ``disabled`` is set if the notifier disabled it."""

    record: EndpointRecord
    disabled: Disabled | None

    @property
    def active(self) -> bool:
        """Whether events are sent to it."""
        return self.disabled is None and not self.record.paused

    def subscribes_to(self, event_type: str) -> bool:
        """Whether it is active and subscribed to events of that type."""
        return self.active and (event_type in self.record.events or ALL_EVENTS in self.record.events)


class EndpointStore:
    """The endpoints of all tenants. Errors as in :class:`ObjectStore`. Reads no clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, record: EndpointRecord, keys: Secrets) -> None:
        """Create an endpoint; it receives events from now on."""
        self.rotate(Tenant(record.tenant), record.id, keys)
        self.update(record)

    def update(self, record: EndpointRecord) -> None:
        """Replace the record; of concurrent writers the last one wins."""
        self._store.put(self.name(Tenant(record.tenant), record.id, "endpoint"), record.model_dump_json().encode())

    def rotate(self, tenant: Tenant, endpoint_id: str, keys: Secrets) -> None:
        """Replace the signing secrets."""
        self._store.put(self.name(tenant, endpoint_id, "secrets"), keys.model_dump_json().encode(), private=True)

    def disable(self, tenant: Tenant, endpoint_id: str, disabled: Disabled) -> None:
        """Stop sending. Only the notifier calls this."""
        self._store.put(self.name(tenant, endpoint_id, "disabled"), disabled.model_dump_json().encode())

    def clear_failing(self, tenant: Tenant, endpoint_id: str) -> None:
        """A delivery succeeded. Only the notifier calls this."""
        name = self.name(tenant, endpoint_id, "failing")
        if self._store.get(name) is not None:
            self._store.delete([name])

    def mark_failing(self, tenant: Tenant, endpoint_id: str, at_ms: int) -> int:
        """An attempt failed; the time in Unix ms since which all have. Only the notifier calls this."""
        name = self.name(tenant, endpoint_id, "failing")
        found = self._store.get(name)
        if found is None:
            self._store.put(name, b"%d" % at_ms)
            return at_ms
        return int(found)

    def get(self, tenant: Tenant, endpoint_id: str) -> Endpoint | None:
        """The endpoint; None if the tenant has none with that id."""
        if not is_id(endpoint_id, ENDPOINT):
            return None
        found = self._store.get(self.name(tenant, endpoint_id, "endpoint"))
        if found is None:
            return None
        record = EndpointRecord.model_validate_json(found)
        mark = self._store.get(self.name(tenant, endpoint_id, "disabled"))
        disabled = Disabled.model_validate_json(mark) if mark is not None else None
        return Endpoint(record, None if disabled is None or disabled.at_ms < record.enabled_at_ms else disabled)

    def secrets(self, tenant: Tenant, endpoint_id: str) -> Secrets | None:
        """The signing secrets; None if there is no such endpoint."""
        found = self._store.get(self.name(tenant, endpoint_id, "secrets")) if is_id(endpoint_id, ENDPOINT) else None
        return None if found is None else Secrets.model_validate_json(found)

    def of(self, tenant: Tenant) -> list[Endpoint]:
        """All endpoints of a tenant, oldest first: they are few. Damaged records are logged and skipped."""
        found: list[Endpoint] = []
        for endpoint_id in self.ids(tenant):
            try:
                endpoint = self.get(tenant, endpoint_id)
            except ValidationError as error:
                log.error(
                    "webhook_endpoint_damaged", endpoint_id=endpoint_id, tenant=tenant, errors=error.error_count()
                )
                continue
            if endpoint is not None:
                found.append(endpoint)
        return found

    def ids(self, tenant: Tenant) -> list[str]:
        """Ids of a tenant's endpoints, oldest first; the record of one may be gone, or not written yet."""
        return [name for name in self._store.names(f"{folder_of(tenant)}/webhooks") if is_id(name, ENDPOINT)]

    def all_ids(self) -> Iterator[tuple[Tenant, str]]:
        """The tenant and id of every endpoint."""
        for folder in self._store.names(""):
            if is_tenant_folder(folder):
                tenant = tenant_of(folder)
                yield from ((tenant, endpoint_id) for endpoint_id in self.ids(tenant))

    def delete(self, tenant: Tenant, endpoint_id: str) -> None:
        """Delete an endpoint with its deliveries, pending ones included."""
        self._store.delete([self.name(tenant, endpoint_id, "endpoint")])
        self._store.delete_below(f"{folder_of(tenant)}/webhooks/{endpoint_id}")

    @staticmethod
    def name(tenant: Tenant, endpoint_id: str, part: str) -> str:
        """The full name of an object that belongs to an endpoint."""
        return f"{folder_of(tenant)}/webhooks/{endpoint_id}/{part}"
