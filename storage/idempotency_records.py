"""Store which request an idempotency key was sent with, and what that request created, so that retries find it.

A request without a key is recorded under its own digest until its response is sent, so that a retry after a lost
response finds what the request created::

    <tenant>/requests/key-<sha256 of the key>         RequestRecord as JSON
    <tenant>/requests/unanswered-<digest of it>       RequestRecord as JSON
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, ValidationError

from queue_schemas import Tenant

from .names import folder_of
from .objects import ObjectStore

_READ_TOGETHER = 100
"""Records to read in one call."""


class RequestRecord(BaseModel):
    """``request`` is the digest of the request, ``result`` the id of what it created. Times are Unix milliseconds."""

    model_config = ConfigDict(frozen=True)

    request: str
    result: str
    created_ms: int
    expires_ms: int


class RequestRecords:
    """The records of all tenants. Errors as in :class:`ObjectStore`. Reads no clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def of_key(key: str) -> str:
        """The name of the record of an idempotency key."""
        return f"key-{hashlib.sha256(key.encode()).hexdigest()}"

    @staticmethod
    def of_request(digest: str) -> str:
        """The name of the record of a request without a key."""
        return f"unanswered-{digest}"

    def claim(self, tenant: Tenant, name: str, record: RequestRecord, now_ms: int) -> RequestRecord:
        """Write ``record`` unless the name has one that has not expired; the record that holds the name then. Of
        concurrent claims, by any number of Routers, one wins."""
        path, data = _path(tenant, name), record.model_dump_json().encode()
        if self._store.put_new(path, data):
            return record
        holder = self.get(tenant, name)
        if holder is not None and now_ms < holder.expires_ms:
            return holder
        self._store.put(path, data)
        return record

    def put(self, tenant: Tenant, name: str, record: RequestRecord) -> None:
        """Write ``record``, replacing one of that name."""
        self._store.put(_path(tenant, name), record.model_dump_json().encode())

    def get(self, tenant: Tenant, name: str) -> RequestRecord | None:
        """The record of that name; None if it does not exist or is damaged."""
        return _parsed(self._store.get(_path(tenant, name)))

    def release(self, tenant: Tenant, name: str, record: RequestRecord) -> None:
        """Remove the record of that name if it is still this one."""
        if self.get(tenant, name) == record:
            self._store.delete([_path(tenant, name)])

    def expired(self, tenant: Tenant, now_ms: int) -> Iterator[str]:
        """The full names of the objects of records that have expired or are damaged."""
        names = self._store.names(f"{folder_of(tenant)}/requests")
        for first in range(0, len(names), _READ_TOGETHER):
            paths = [_path(tenant, name) for name in names[first : first + _READ_TOGETHER]]
            for path, data in zip(paths, self._store.get_many(paths), strict=True):
                record = _parsed(data)
                if record is None or record.expires_ms <= now_ms:
                    yield path


def _path(tenant: Tenant, name: str) -> str:
    return f"{folder_of(tenant)}/requests/{name}"


def _parsed(data: bytes | None) -> RequestRecord | None:
    try:
        return None if data is None else RequestRecord.model_validate_json(data)
    except ValidationError:
        return None
