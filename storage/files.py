"""Files: what clients upload, and what batches give out.

A file is a record and its parts, immutable objects that follow each other: however large an output grows, no part of
it is copied again. The record is written last, so a file is there whole or not at all.

::

    <tenant>/files/<id>/record        FileRecord as JSON
    <tenant>/files/<id>/part-000000   ...
    expiring/<seconds>~<tenant>~<id>  an empty object for each file that expires
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import BaseModel, ConfigDict

from queue_schemas import BodyTooLarge, Tenant

from .names import FILE, folder_of, is_id, tenant_of
from .objects import PIECE_BYTES, ObjectMissing, ObjectStore, Writer

Order = Literal["asc", "desc"]
_EXPIRING = "expiring"


class Part(BaseModel):
    """One object of a file, by its full name in the store; ``size`` in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int


class FileRecord(BaseModel):
    """A file. Times are Unix seconds; ``sha256`` is of uploads only."""

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


class Upload:
    """A file that comes in. ``size`` counts its bytes so far."""

    def __init__(self, writer: Writer, most_bytes: int) -> None:
        self._writer = writer
        self._most_bytes = most_bytes
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises ``BodyTooLarge`` past the limit."""
        self.size += len(data)
        if self.size > self._most_bytes:
            raise BodyTooLarge(f"the file has more than {self._most_bytes} bytes: split it", param="file")
        self._hash.update(data)
        self._writer.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Files:
    """The files of all tenants. Errors as in :class:`ObjectStore`. Nothing here looks at a clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @contextmanager
    def upload(self, tenant: Tenant, file_id: str, most_bytes: int) -> Iterator[Upload]:
        """Write the one part of a file; :meth:`add` then makes it one. Left by an error, nothing stays."""
        with self._store.writer(self.part_name(tenant, file_id, 0)) as writer:
            yield Upload(writer, most_bytes)

    def add(self, record: FileRecord) -> None:
        """The file is there from now on. Its parts must be. Again with the same record it changes nothing."""
        if record.expires_at is not None:
            self._store.put(_expiring(record), b"")
        self._store.put(_record(Tenant(record.tenant), record.id), record.model_dump_json().encode())

    def get(self, tenant: Tenant, file_id: str, now_s: float) -> FileRecord | None:
        """The file; None if the tenant has none of that id, or not any more."""
        if not is_id(file_id, FILE):
            return None
        found = self._store.get(_record(tenant, file_id))
        record = FileRecord.model_validate_json(found) if found is not None else None
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
        """Up to ``limit`` files by age behind the one called ``after``, and whether there are more."""
        ids = self._store.names(f"{folder_of(tenant)}/files")
        if order == "desc":
            ids.reverse()
        if after:
            ids = [name for name in ids if (name < after if order == "desc" else name > after)]
        page: list[FileRecord] = []
        for file_id in ids:
            record = self.get(tenant, file_id, now_s)
            if record is None or (purpose and record.purpose != purpose):
                continue
            if len(page) == limit:
                return page, True
            page.append(record)
        return page, False

    def delete(self, record: FileRecord) -> None:
        """Remove a file, its record first: half a file is none."""
        tenant = Tenant(record.tenant)
        self._store.delete([_record(tenant, record.id)])
        self._store.delete(part.name for part in record.parts)
        self._store.delete_below(f"{folder_of(tenant)}/files/{record.id}")
        if record.expires_at is not None:
            self._store.delete([_expiring(record)])

    def expired(self, now_s: float) -> list[FileRecord]:
        """Files whose time is over, of all tenants."""
        found = []
        for name in self._store.names(_EXPIRING):
            at, folder, file_id = name.split("~", 2)
            if int(at) > now_s:
                break
            stored = self._store.get(_record(tenant_of(folder), file_id))
            if stored is None:
                self._store.delete([f"{_EXPIRING}/{name}"])
            else:
                found.append(FileRecord.model_validate_json(stored))
        return found

    def read(self, record: FileRecord, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes ``start`` to ``end`` (exclusive; None: the end) in pieces. Raises ``ObjectMissing`` if any is gone."""
        stop = record.bytes if end is None else min(end, record.bytes)
        at = 0
        for part in record.parts:
            begin, finish = max(start - at, 0), min(stop - at, part.size)
            at += part.size
            if begin >= finish:
                continue
            with self._store.reader(part.name, begin) as file:
                left = finish - begin
                while left > 0:
                    piece = file.read(min(PIECE_BYTES, left))
                    if not piece:
                        raise ObjectMissing(f"{part.name} is shorter than its record says")
                    left -= len(piece)
                    yield piece

    @staticmethod
    def part_name(tenant: Tenant, file_id: str, number: int) -> str:
        """The full name of a file's part: write it, then name it in the record."""
        return f"{folder_of(tenant)}/files/{file_id}/part-{number:06d}"


def _record(tenant: Tenant, file_id: str) -> str:
    return f"{folder_of(tenant)}/files/{file_id}/record"


def _expiring(record: FileRecord) -> str:
    return f"{_EXPIRING}/{record.expires_at:012d}~{folder_of(Tenant(record.tenant))}~{record.id}"
