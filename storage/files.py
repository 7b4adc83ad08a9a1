"""Store files: uploads of clients, and outputs of batches.

A file is a record and its parts, immutable objects in a row: however large an output grows, no part is copied again.
The record is written last and removed first, so that a file is complete or absent.

::

    <tenant>/files/<id>/record        FileRecord as JSON
    <tenant>/files/<id>/part-000000   ...
    expiring/<seconds>~<tenant>~<id>  an empty object for each file that expires, by its Unix time
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from queue_schemas import BodyTooLarge, Tenant

from .failures import ObjectMissing
from .names import FILE, folder_of, is_id, tenant_of
from .objects import PIECE_BYTES, ObjectStore
from .writing import ObjectWriter

Order = Literal["asc", "desc"]
EXPIRING = "expiring"
_READ_TOGETHER = 100
"""Records to read in one call."""


class Part(BaseModel):
    """One object of a file, by its full name in the store; ``size`` is in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int


class FileRecord(BaseModel):
    """A file. Times are Unix seconds; only uploads have a ``sha256``."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    filename: str
    purpose: str
    created_at: int
    bytes: int
    expires_at: int | None = None
    sha256: str = ""
    parts: tuple[Part, ...] = ()

    def expired(self, now_s: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now_s


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """What one tenant stores: the number of files, and the bytes of all its objects."""

    files: int
    bytes: int


class Upload:
    """A file that is being uploaded: call ``write`` repeatedly, then ``commit`` and :meth:`FileStore.add`; or
    ``discard``, which leaves nothing. ``size`` is the number of bytes so far."""

    def __init__(self, writer: ObjectWriter, store: ObjectStore, name: str, max_bytes: int) -> None:
        self._writer = writer
        self._store = store
        self._name = name
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises ``BodyTooLarge`` past the limit."""
        self.size += len(data)
        if self.size > self._max_bytes:
            raise BodyTooLarge(f"the file has more than {self._max_bytes} bytes: split it", param="file")
        self._hash.update(data)
        self._writer.write(data)

    def commit(self) -> None:
        """Store its one part."""
        self._writer.commit()

    def discard(self) -> None:
        """Remove its part from the store, committed or not."""
        self._writer.discard()
        self._store.delete([self._name])

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(name=self._name, size=self.size),)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class FileStore:
    """The files of all tenants. Errors as in :class:`ObjectStore`. Reads no clock.

    :mod:`storage.sweep` removes expired files and leftovers.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def begin(self, tenant: Tenant, file_id: str, max_bytes: int) -> Upload:
        """Begin to write the one part of a file; :meth:`add` makes it a file."""
        name = self.part_name(tenant, file_id, 0)
        return Upload(self.store.begin(name), self.store, name, max_bytes)

    @contextmanager
    def upload(self, tenant: Tenant, file_id: str, max_bytes: int) -> Iterator[Upload]:
        """:meth:`begin`, committed at the end of the block. Left by an error, nothing stays."""
        upload = self.begin(tenant, file_id, max_bytes)
        try:
            yield upload
            upload.commit()
        except BaseException:
            upload.discard()
            raise

    def add(self, record: FileRecord) -> None:
        """Make the file visible. Its parts must be stored. A second call with the same record changes nothing."""
        if record.expires_at is not None:
            self.store.put(_expiring(record), b"")
        self.store.put(_record(Tenant(record.tenant), record.id), record.model_dump_json().encode())

    def get(self, tenant: Tenant, file_id: str, now_s: float) -> FileRecord | None:
        """The file; None if the tenant has none with that id, or it has expired. With ``now_s`` 0 expired files that
        are not removed yet count too."""
        if not is_id(file_id, FILE):
            return None
        record = _parsed(self.store.get(_record(tenant, file_id)))
        return None if record is None or record.expired(now_s) else record

    def page(
        self,
        tenant: Tenant,
        now_s: float,
        *,
        after: str = "",
        limit: int = 10_000,
        order: Order = "desc",
        purpose: str = "",
    ) -> tuple[list[FileRecord], bool]:
        """Up to ``limit`` files, by age, that follow the one with the id ``after``; and whether there are more."""
        ids = [name for name in self.store.names(f"{folder_of(tenant)}/files") if is_id(name, FILE)]
        if order == "desc":
            ids.reverse()
        if after:
            ids = [name for name in ids if (name < after if order == "desc" else name > after)]
        page: list[FileRecord] = []
        step = min(_READ_TOGETHER, limit + 1)
        for first in range(0, len(ids), step):
            names = [_record(tenant, file_id) for file_id in ids[first : first + step]]
            for found in self.store.get_many(names):
                record = _parsed(found)
                if record is None or record.expired(now_s) or (purpose and record.purpose != purpose):
                    continue
                if len(page) == limit:
                    return page, True
                page.append(record)
        return page, False

    def usage(self, tenant: Tenant) -> StorageUsage:
        """What the tenant stores now. Lists all its objects."""
        sizes = self.store.sizes(folder_of(tenant))
        records = f"{folder_of(tenant)}/files/"
        files = sum(1 for name in sizes if name.startswith(records) and name.endswith("/record"))
        return StorageUsage(files, sum(sizes.values()))

    def delete(self, record: FileRecord) -> None:
        """Remove a file, its record first, so that no partial file is visible."""
        tenant = Tenant(record.tenant)
        self.store.delete([_record(tenant, record.id)])
        folder = folder_of_file(tenant, record.id)
        self.store.delete(part.name for part in record.parts if not part.name.startswith(f"{folder}/"))
        self.store.delete_below(folder)
        if record.expires_at is not None:
            self.store.delete([_expiring(record)])

    def expired(self, now_s: float) -> list[FileRecord]:
        """The expired files of all tenants."""
        found = []
        for name in self.store.names(EXPIRING):
            at, _, rest = name.partition("~")
            folder, _, file_id = rest.rpartition("~")
            if not at.isdecimal() or not is_id(file_id, FILE):
                continue
            if int(at) > now_s:
                break
            record = _parsed(self.store.get(_record(tenant_of(folder), file_id)))
            if record is None:
                self.store.delete([f"{EXPIRING}/{name}"])
            else:
                found.append(record)
        return found

    def piece(self, record: FileRecord, start: int, end: int) -> bytes:
        """Bytes of the file from ``start`` to at most ``end`` (exclusive): up to ``PIECE_BYTES`` of one part; empty
        only at the end. Raises ``ObjectMissing``."""
        at = 0
        for part in record.parts:
            if start < at + part.size and start < end:
                stop = min(end - at, part.size, start - at + PIECE_BYTES)
                data = self.store.read(part.name, start - at, stop)
                if not data:
                    raise ObjectMissing(f"{part.name} is shorter than its record says")
                return data
            at += part.size
        return b""

    def read(self, record: FileRecord, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes ``start`` to ``end`` (exclusive; None: the end) in pieces. Raises ``ObjectMissing`` if a part is
        gone."""
        stop = record.bytes if end is None else min(end, record.bytes)
        while piece := self.piece(record, start, stop):
            start += len(piece)
            yield piece

    @staticmethod
    def part_name(tenant: Tenant, file_id: str, number: int) -> str:
        """The full name of a file's part."""
        return f"{folder_of_file(tenant, file_id)}/part-{number:06d}"


def folder_of_file(tenant: Tenant, file_id: str) -> str:
    """The folder of one file's objects."""
    return f"{folder_of(tenant)}/files/{file_id}"


def _record(tenant: Tenant, file_id: str) -> str:
    return f"{folder_of_file(tenant, file_id)}/record"


def _parsed(record: bytes | None) -> FileRecord | None:
    return None if record is None else FileRecord.model_validate_json(record)


def _expiring(record: FileRecord) -> str:
    return f"{EXPIRING}/{record.expires_at:012d}~{folder_of(Tenant(record.tenant))}~{record.id}"
