"""Files: what clients upload, and what batches give out.

A file is a record and its parts, immutable objects that follow each other: however large an output grows, no part of
it is copied again. The record is written last and removed first, so a file is there whole or not at all.

::

    <tenant>/files/<id>/record        FileRecord as JSON
    <tenant>/files/<id>/part-000000   ...
    expiring/<seconds>~<tenant>~<id>  an empty object for each file that expires
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
_AT_ONCE = 100
"""Records that are read together."""


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


@dataclass(frozen=True, slots=True)
class Kept:
    """What the store holds of one tenant: files, and the bytes of everything."""

    files: int
    bytes: int


class Upload:
    """A file that comes in: ``write`` as often as wanted, then ``commit`` and :meth:`Files.add`; or ``discard``, after
    which nothing is left. ``size`` counts its bytes so far."""

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
        """Its one part is in the store from now on."""
        self._writer.commit()

    def discard(self) -> None:
        """Whatever has become of it, its part is not in the store from now on."""
        self._writer.discard()
        self._store.delete([self._name])

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(name=self._name, size=self.size),)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Files:
    """The files of all tenants. Errors as in :class:`ObjectStore`. Nothing here looks at a clock.

    Removing what expired or was left over is :mod:`storage.sweep`'s.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def begin(self, tenant: Tenant, file_id: str, max_bytes: int) -> Upload:
        """Write the one part of a file; :meth:`add` then makes it one."""
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
        """The file is there from now on. Its parts must be. Again with the same record it changes nothing."""
        if record.expires_at is not None:
            self.store.put(_expiring(record), b"")
        self.store.put(_record(Tenant(record.tenant), record.id), record.model_dump_json().encode())

    def get(self, tenant: Tenant, file_id: str, now_s: float) -> FileRecord | None:
        """The file; None if the tenant has none of that id, or not any more. ``now_s`` 0: also one that has expired
        and was not removed yet."""
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
        """Up to ``limit`` files by age behind the one called ``after``, and whether there are more."""
        ids = [name for name in self.store.names(f"{folder_of(tenant)}/files") if is_id(name, FILE)]
        if order == "desc":
            ids.reverse()
        if after:
            ids = [name for name in ids if (name < after if order == "desc" else name > after)]
        page: list[FileRecord] = []
        at_once = min(_AT_ONCE, limit + 1)
        for first in range(0, len(ids), at_once):
            names = [_record(tenant, file_id) for file_id in ids[first : first + at_once]]
            for found in self.store.get_many(names):
                record = _parsed(found)
                if record is None or record.expired(now_s) or (purpose and record.purpose != purpose):
                    continue
                if len(page) == limit:
                    return page, True
                page.append(record)
        return page, False

    def kept(self, tenant: Tenant) -> Kept:
        """What the store holds of the tenant now."""
        sizes = self.store.sizes(folder_of(tenant))
        records = f"{folder_of(tenant)}/files/"
        files = sum(1 for name in sizes if name.startswith(records) and name.endswith("/record"))
        return Kept(files, sum(sizes.values()))

    def delete(self, record: FileRecord) -> None:
        """Remove a file, its record first: half a file is none."""
        tenant = Tenant(record.tenant)
        self.store.delete([_record(tenant, record.id)])
        folder = folder_of_file(tenant, record.id)
        self.store.delete(part.name for part in record.parts if not part.name.startswith(f"{folder}/"))
        self.store.delete_below(folder)
        if record.expires_at is not None:
            self.store.delete([_expiring(record)])

    def expired(self, now_s: float) -> list[FileRecord]:
        """Files whose time is over, of all tenants."""
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
        """Bytes of the file from ``start`` on, before ``end``: as many as one call gives (``PIECE_BYTES`` at most),
        and none only where there are none. Raises ``ObjectMissing``."""
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
        """Bytes ``start`` to ``end`` (exclusive; None: the end) in pieces. Raises ``ObjectMissing`` if any is gone."""
        stop = record.bytes if end is None else min(end, record.bytes)
        while piece := self.piece(record, start, stop):
            start += len(piece)
            yield piece

    @staticmethod
    def part_name(tenant: Tenant, file_id: str, number: int) -> str:
        """The full name of a file's part: write it, then name it in the record."""
        return f"{folder_of_file(tenant, file_id)}/part-{number:06d}"


def folder_of_file(tenant: Tenant, file_id: str) -> str:
    """Where the objects of one file lie."""
    return f"{folder_of(tenant)}/files/{file_id}"


def _record(tenant: Tenant, file_id: str) -> str:
    return f"{folder_of_file(tenant, file_id)}/record"


def _parsed(record: bytes | None) -> FileRecord | None:
    return None if record is None else FileRecord.model_validate_json(record)


def _expiring(record: FileRecord) -> str:
    return f"{EXPIRING}/{record.expires_at:012d}~{folder_of(Tenant(record.tenant))}~{record.id}"
