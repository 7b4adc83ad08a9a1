"""Ids of files, batches, webhooks and events, and where a tenant's lie.

An id is its kind, the time in milliseconds (48 bits) and 80 random bits, in hexadecimal: they sort by age, and nobody
guesses one.
"""

from __future__ import annotations

import re
import secrets

from queue_schemas import BadRequest, Tenant
from queue_schemas.ids import decode_name, encode_name

FILE = "file-"
BATCH = "batch_"
ENDPOINT = "we_"
EVENT = "evt_"
_ID = re.compile(r"(?:file-|batch_|evt_|we_)[0-9a-f]{32}")
_FOLDER = "t-"
_MAX_FOLDER = 190
"""A file's name may have 255 bytes: this, an id, a time and what is between."""


def new_file_id(now_ms: int) -> str:
    return new_id(FILE, now_ms)


def new_batch_id(now_ms: int) -> str:
    return new_id(BATCH, now_ms)


def new_endpoint_id(now_ms: int) -> str:
    return new_id(ENDPOINT, now_ms)


def new_id(kind: str, now_ms: int) -> str:
    """A fresh id, ``kind`` and 32 hex digits."""
    return f"{kind}{now_ms:012x}{secrets.token_hex(10)}"


def is_id(value: str, kind: str) -> bool:
    """Whether ``value`` has the shape of an id of that kind: only such a one becomes part of an object's name."""
    return value.startswith(kind) and _ID.fullmatch(value) is not None


def created_ms(name: str) -> int:
    """The Unix time in milliseconds at which an id was made."""
    return int(name[-32:-20], 16)


def folder_of(tenant: Tenant) -> str:
    """The tenant's part of an object's name: nothing in it is special to any store.

    Raises ``BadRequest`` for a name that with an id behind it would be too long for a file's.
    """
    folder = _FOLDER + encode_name(tenant)
    if len(folder) > _MAX_FOLDER:
        raise BadRequest("the tenant's name is too long for the file store: it wants one of at most 60 bytes")
    return folder


def tenant_of(folder: str) -> Tenant:
    """The inverse of :func:`folder_of`."""
    return Tenant(decode_name(folder.removeprefix(_FOLDER)))


def is_tenants(name: str) -> bool:
    """Whether that name at the root of the store is a tenant's folder."""
    return name.startswith(_FOLDER)
