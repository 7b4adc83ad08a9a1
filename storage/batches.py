"""Batches as they lie in the store: what was asked, whether it is to be cancelled, and how far it has come.

Each object has one writer. The Router writes ``request`` (once) and ``cancel`` (once); the batcher ``progress`` and,
once, ``end``, and what it keeps below ``run/``. What has ended stays so: ``end`` goes before whatever a batcher that
was late may still write to ``progress``.

::

    <tenant>/batches/<id>/request     BatchRequest
    <tenant>/batches/<id>/cancel      the Unix time at which it was asked to be cancelled, as text
    <tenant>/batches/<id>/progress    BatchProgress; none until the batcher has looked at it
    <tenant>/batches/<id>/end         BatchProgress of a batch that has ended
    <tenant>/batches/<id>/run/...     the batcher's own (:mod:`batches`), gone soon after the end
    live/<tenant>~<id>                an empty object for each batch that has not ended
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, ValidationError

from queue_schemas import Tenant
from telemetry import get_logger

from .names import BATCH, folder_of, is_id, tenant_of
from .objects import ObjectStore

_LIVE = "live"

log = get_logger(__name__)


class BatchStatus(StrEnum):
    """The vendor's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_ENDED = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class OutputExpiry(_Record):
    """When the output and error files expire: ``seconds`` after their creation (``anchor`` is ``created_at``)."""

    anchor: str = "created_at"
    seconds: int


class BatchRequest(_Record):
    """What was asked. Times are Unix seconds."""

    id: str
    tenant: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiry | None = None


class BatchError(_Record):
    """One thing that is wrong with a batch; ``line`` of its input counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchProgress(_Record):
    """How far it has come. ``stamps`` are Unix seconds by the name of their field in the API (``in_progress_at``...);
    ``usage`` is in tokens: ``input_tokens``, ``output_tokens``, ``total_tokens``, ``cached_tokens``,
    ``reasoning_tokens``."""

    status: BatchStatus = BatchStatus.VALIDATING
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    stamps: dict[str, int] = {}
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it stands. ``cancel_asked_at`` is None unless it is to be cancelled."""

    request: BatchRequest
    progress: BatchProgress
    cancel_asked_at: int | None

    @property
    def ended(self) -> bool:
        return self.progress.status in BATCH_ENDED


class Batches:
    """The batches of all tenants. Errors as in :class:`ObjectStore`. Nothing here looks at a clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, request: BatchRequest) -> None:
        """Take a batch in. Whoever dies midway leaves a mark without a batch, never a batch without a mark."""
        tenant = Tenant(request.tenant)
        self._store.put(_live(tenant, request.id), b"")
        self._store.put(self.name(tenant, request.id, "request"), request.model_dump_json().encode())

    def get(self, tenant: Tenant, batch_id: str) -> Batch | None:
        """The batch; None if the tenant has none of that id. Raises ``ValidationError`` if what was asked, or its end,
        is damaged."""
        data = self._store.get(self.name(tenant, batch_id, "request")) if is_id(batch_id, BATCH) else None
        if data is None:
            return None
        request = BatchRequest.model_validate_json(data)
        end = self._store.get(self.name(tenant, batch_id, "end"))
        progress = self._progress(tenant, batch_id) if end is None else BatchProgress.model_validate_json(end)
        cancel = self._store.get(self.name(tenant, batch_id, "cancel"))
        if cancel is None:
            return Batch(request, progress, None)
        return Batch(request, progress, int(cancel) if cancel.isdigit() else request.created_at)

    def asked(self, tenant: Tenant, batch_id: str) -> BatchRequest | None:
        """What was asked of the batch; for who looks at many, as one that is damaged keeps nothing from the others: it
        is None too, and the log says so."""
        data = self._store.get(self.name(tenant, batch_id, "request")) if is_id(batch_id, BATCH) else None
        try:
            return None if data is None else BatchRequest.model_validate_json(data)
        except ValidationError as error:
            log.error("batch_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
            return None

    def page(self, tenant: Tenant, *, after: str = "", limit: int = 20) -> tuple[list[Batch], bool]:
        """Up to ``limit`` batches, newest first, behind the one called ``after``, and whether there are more."""
        page: list[Batch] = []
        for batch_id in reversed(self._store.names(f"{folder_of(tenant)}/batches")):
            if after and batch_id >= after:
                continue
            if len(page) == limit:
                return page, True
            try:
                batch = self.get(tenant, batch_id)
            except ValidationError as error:
                log.error("batch_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
                continue
            if batch is not None:
                page.append(batch)
        return page, False

    def ask_to_cancel(self, tenant: Tenant, batch_id: str, at_s: int) -> None:
        """The batcher will notice. Of several calls the first counts, as nearly as the store allows."""
        name = self.name(tenant, batch_id, "cancel")
        if self._store.get(name) is None:
            self._store.put(name, b"%d" % at_s)

    def advance(self, tenant: Tenant, batch_id: str, progress: BatchProgress) -> None:
        """Write how far it has come. For the batcher alone."""
        self._store.put(self.name(tenant, batch_id, "progress"), progress.model_dump_json().encode())

    def end(self, tenant: Tenant, batch_id: str, progress: BatchProgress) -> None:
        """Write how it has ended. For the batcher alone; :meth:`retire` it then."""
        self._store.put(self.name(tenant, batch_id, "end"), progress.model_dump_json().encode())

    def live(self) -> list[tuple[Tenant, str]]:
        """Batches that have not ended, oldest first; a mark may have no batch (yet)."""
        found = []
        for name in self._store.names(_LIVE):
            folder, _, batch_id = name.rpartition("~")
            found.append((tenant_of(folder), batch_id))
        return sorted(found, key=lambda batch: batch[1])

    def retire(self, tenant: Tenant, batch_id: str) -> None:
        """Take the mark away of a batch that has ended."""
        self._store.delete([_live(tenant, batch_id)])

    def _progress(self, tenant: Tenant, batch_id: str) -> BatchProgress:
        """What is damaged counts as none: the batcher writes it anew."""
        data = self._store.get(self.name(tenant, batch_id, "progress"))
        try:
            return BatchProgress() if data is None else BatchProgress.model_validate_json(data)
        except ValidationError as error:
            log.error("batch_progress_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
            return BatchProgress()

    @staticmethod
    def name(tenant: Tenant, batch_id: str, part: str) -> str:
        """The full name of an object that belongs to a batch."""
        return f"{folder_of(tenant)}/batches/{batch_id}/{part}"


def _live(tenant: Tenant, batch_id: str) -> str:
    return f"{_LIVE}/{folder_of(tenant)}~{batch_id}"
