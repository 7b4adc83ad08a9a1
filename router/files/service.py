"""Finds, lists and deletes the files of all tenants in the store."""

from __future__ import annotations

from typing import Literal

from queue_schemas import BadRequest, Conflict, NotFound, Tenant
from storage import BatchStore, FileRecord, FileStore, ObjectMissing
from storage.names import FILE, is_id
from telemetry import get_logger

log = get_logger(__name__)


class FileService:
    """All methods block: call them in threads (:meth:`router.store.AsyncStore.run`)."""

    def __init__(self, files: FileStore, batches: BatchStore) -> None:
        self._files = files
        self._batches = batches

    def page(
        self, tenant: Tenant, now_s: float, *, after: str, limit: int, order: Literal["asc", "desc"], purpose: str
    ) -> tuple[list[FileRecord], bool]:
        """Files behind the one called ``after``, and whether there are more. Raises ``BadRequest``."""
        if after and not is_id(after, FILE):
            raise BadRequest("after must be the id of a file: the last_id of the page before", param="after")
        return self._files.page(tenant, now_s, after=after, limit=limit, order=order, purpose=purpose)

    def get(self, tenant: Tenant, file_id: str, now_s: float) -> FileRecord:
        """Raises ``NotFound``, for a file of another tenant, too."""
        record = self._files.get(tenant, file_id, now_s)
        if record is None:
            raise NotFound(f"no file {file_id[:80]!r} found for this API key", param="file_id")
        return record

    def read(self, record: FileRecord, start: int, end: int) -> bytes:
        """The first of the file's bytes from ``start`` to ``end``. Raises ``NotFound`` if the store has lost them."""
        try:
            return self._files.piece(record, start, end)
        except ObjectMissing as error:
            log.error("content_missing", file_id=record.id, object=str(error))
            raise NotFound(
                f"the content of {record.id} is not there any more: upload it again", param="file_id"
            ) from error

    def delete(self, tenant: Tenant, file_id: str, now_s: float) -> None:
        """Raises ``NotFound``, and ``Conflict`` if a batch still has to read it."""
        record = self.get(tenant, file_id, now_s)
        for owner, batch_id in self._batches.live():
            if owner == tenant and self._reads(tenant, batch_id, file_id):
                raise Conflict(
                    f"{batch_id} still reads it: wait for the batch to end, or cancel it first", param="file_id"
                )
        self._files.delete(record)
        log.info("file_deleted", file_id=file_id, tenant=tenant)

    def _reads(self, tenant: Tenant, batch_id: str, file_id: str) -> bool:
        request = self._batches.request(tenant, batch_id)
        if request is None or request.input_file_id != file_id:
            return False
        batch = self._batches.get(tenant, batch_id)
        return batch is not None and not batch.ended
