"""Ids of stored things, and the folder of each tenant.

An id is a prefix (its kind), the time in milliseconds (48 bits) and 80 random bits, in hexadecimal: ids sort by age and
cannot be guessed.
"""

from __future__ import annotations

import re
import secrets

from queue_schemas import BadRequest, Tenant
from queue_schemas.ids import decode_name, encode_name

FILE = "file-"
BATCH = "batch_"
_DIGITS = re.compile(r"[0-9a-f]{32}")
_FOLDER = "t-"
_MAX_FOLDER = 190
"""A file name may have 255 bytes: the folder, an id, a time and separators."""


def new_file_id(now_ms: int) -> str:
    """A fresh file id; ids sort by time."""
    return new_id(FILE, now_ms)


def new_batch_id(now_ms: int) -> str:
    """A fresh batch id; ids sort by time."""
    return new_id(BATCH, now_ms)


def new_id(kind: str, now_ms: int) -> str:
    """A fresh id, ``kind`` and 32 hex digits."""
    return f"{kind}{now_ms:012x}{secrets.token_hex(10)}"


def is_id(value: str, kind: str) -> bool:
    """Whether ``value`` is a well-formed id of that kind. Only such values become part of an object's name."""
    return value.startswith(kind) and _DIGITS.fullmatch(value, len(kind)) is not None


def created_ms(name: str) -> int:
    """The Unix time in milliseconds at which an id was made."""
    return int(name[-32:-20], 16)


def folder_of(tenant: Tenant) -> str:
    """The tenant's folder: the first part of an object's name, without characters that are special to any store.

    Raises ``BadRequest`` for a tenant whose object names would be too long.
    """
    folder = _FOLDER + encode_name(tenant)
    if len(folder) > _MAX_FOLDER:
        raise BadRequest("the tenant's name is too long for the file store: use one of at most 60 bytes")
    return folder


def tenant_of(folder: str) -> Tenant:
    """The inverse of :func:`folder_of`."""
    return Tenant(decode_name(folder.removeprefix(_FOLDER)))


def is_tenant_folder(name: str) -> bool:
    """Whether ``name``, at the root of the store, is a tenant's folder."""
    return name.startswith(_FOLDER)
