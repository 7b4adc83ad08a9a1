"""Webhook endpoints as they lie in the store: where to send, what for, and the secrets to sign with.

Each object has one writer. The Router writes ``endpoint`` and ``secrets``, the notifier ``disabled`` and ``failing``::

    <tenant>/webhooks/<id>/endpoint   EndpointRecord as JSON; written last, so an endpoint is there whole or not at all
    <tenant>/webhooks/<id>/secrets    Secrets as JSON, for the eyes of the files' owner only
    <tenant>/webhooks/<id>/disabled   Disabled as JSON, once it was; it counts until the Router enables it later
    <tenant>/webhooks/<id>/failing    since when (Unix ms, as text) it has taken nothing; none while it takes what comes
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
from storage.names import ENDPOINT, folder_of, is_id, is_tenants, tenant_of
from storage.objects import ObjectStore
from telemetry import get_logger

from .events import ALL_EVENTS

SECRET_BYTES = 32
MAX_EARLIER = 3
_PREFIX = "whsec_"

log = get_logger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class EndpointRecord(_Record):
    """Where to send which events. ``events`` may be ``*`` alone. ``*_at`` are Unix seconds; ``enabled_at_ms`` is when
    it was last made or enabled; ``paused``: its owner wants nothing sent."""

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
    """A secret that was replaced, and until when it signs too."""

    secret: str = Field(repr=False)
    until_ms: int


class Secrets(_Record):
    """What is signed with, since ``made_at_ms``; and the newest few from before, for receivers that change over."""

    current: str = Field(repr=False)
    made_at_ms: int
    earlier: tuple[EarlierSecret, ...] = ()

    @classmethod
    def fresh(cls, now_ms: int) -> Self:
        secret = _PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
        return cls(current=secret, made_at_ms=now_ms)

    def rotated(self, now_ms: int, grace_ms: int) -> Self:
        """A fresh secret, beside which this one is good for ``grace_ms``, and earlier ones for no longer. Without a
        grace only the fresh one counts."""
        until_ms = now_ms + grace_ms
        old = [EarlierSecret(secret=self.current, until_ms=until_ms)]
        old += [one.model_copy(update={"until_ms": min(one.until_ms, until_ms)}) for one in self.earlier]
        kept = tuple(one for one in old[:MAX_EARLIER] if one.until_ms > now_ms)
        return self.fresh(now_ms).model_copy(update={"earlier": kept})

    def in_force(self, now_ms: int) -> list[bytes]:
        """The keys to sign with, the current one first."""
        old = [one.secret for one in self.earlier if now_ms < one.until_ms]
        return [base64.b64decode(secret.removeprefix(_PREFIX)) for secret in (self.current, *old)]

    @property
    def fingerprint(self) -> str:
        """What tells the current secret from others without showing it."""
        return hashlib.sha256(self.current.encode()).hexdigest()

    @property
    def hint(self) -> str:
        """What may be shown of the current secret, to tell it from others."""
        return f"{_PREFIX}...{self.current[-4:]}"


class Disabled(_Record):
    """Nothing more is sent, and why."""

    reason: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint as it stands. ``disabled`` says why the notifier stopped sending, if it did."""

    record: EndpointRecord
    disabled: Disabled | None

    @property
    def active(self) -> bool:
        """Whether anything is sent to it."""
        return self.disabled is None and not self.record.paused

    def wants(self, event_type: str) -> bool:
        """Whether events of that type are for it."""
        return self.active and (event_type in self.record.events or ALL_EVENTS in self.record.events)


class Webhooks:
    """The endpoints of all tenants. Errors as in :class:`ObjectStore`. Nothing here looks at a clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, record: EndpointRecord, keys: Secrets) -> None:
        """It gets events from now on."""
        self.rotate(Tenant(record.tenant), record.id, keys)
        self.update(record)

    def update(self, record: EndpointRecord) -> None:
        """Write it anew. Of several at once the last counts."""
        self._store.put(self.name(Tenant(record.tenant), record.id, "endpoint"), record.model_dump_json().encode())

    def rotate(self, tenant: Tenant, endpoint_id: str, keys: Secrets) -> None:
        """Sign with those from now on."""
        self._store.put(self.name(tenant, endpoint_id, "secrets"), keys.model_dump_json().encode(), private=True)

    def disable(self, tenant: Tenant, endpoint_id: str, disabled: Disabled) -> None:
        """Send nothing more. For the notifier alone."""
        self._store.put(self.name(tenant, endpoint_id, "disabled"), disabled.model_dump_json().encode())

    def took(self, tenant: Tenant, endpoint_id: str) -> None:
        """It took something. For the notifier alone, as is the next."""
        name = self.name(tenant, endpoint_id, "failing")
        if self._store.get(name) is not None:
            self._store.delete([name])

    def failed(self, tenant: Tenant, endpoint_id: str, at_ms: int) -> int:
        """It took nothing: since when it has not."""
        name = self.name(tenant, endpoint_id, "failing")
        found = self._store.get(name)
        if found is None:
            self._store.put(name, b"%d" % at_ms)
            return at_ms
        return int(found)

    def get(self, tenant: Tenant, endpoint_id: str) -> Endpoint | None:
        """The endpoint; None if the tenant has none of that id."""
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
        """What is signed with; None for an endpoint that is not there."""
        found = self._store.get(self.name(tenant, endpoint_id, "secrets")) if is_id(endpoint_id, ENDPOINT) else None
        return None if found is None else Secrets.model_validate_json(found)

    def of(self, tenant: Tenant) -> list[Endpoint]:
        """All endpoints of a tenant, oldest first: they are few. One whose record is damaged keeps nothing from the
        others."""
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
        """Ids of a tenant's endpoints, oldest first; one may be gone, or not be there yet."""
        return [name for name in self._store.names(f"{folder_of(tenant)}/webhooks") if is_id(name, ENDPOINT)]

    def everyone(self) -> Iterator[tuple[Tenant, str]]:
        """The ids of all endpoints."""
        for folder in self._store.names(""):
            if is_tenants(folder):
                tenant = tenant_of(folder)
                yield from ((tenant, endpoint_id) for endpoint_id in self.ids(tenant))

    def delete(self, tenant: Tenant, endpoint_id: str) -> None:
        """Forget it and what was sent to it; what is still to be sent is not."""
        self._store.delete([self.name(tenant, endpoint_id, "endpoint")])
        self._store.delete_below(f"{folder_of(tenant)}/webhooks/{endpoint_id}")

    @staticmethod
    def name(tenant: Tenant, endpoint_id: str, part: str) -> str:
        """The full name of an object that belongs to an endpoint."""
        return f"{folder_of(tenant)}/webhooks/{endpoint_id}/{part}"
