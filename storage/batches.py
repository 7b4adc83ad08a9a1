"""Store batches: the request, whether it is to be cancelled, the progress, and the end.

Each object has one writer. The Router writes ``request`` and ``cancel``, once each; the batcher writes ``progress``,
once ``end``, and its own objects below ``run/``. An end is final: ``end`` takes precedence over anything that a late
batcher still writes to ``progress``.

::

    <tenant>/batches/<id>/request     BatchRequest
    <tenant>/batches/<id>/cancel      the Unix time at which a cancel was requested, as text
    <tenant>/batches/<id>/progress    BatchProgress; absent until the batcher begins
    <tenant>/batches/<id>/end         BatchEnd: everything about a batch that has ended
    <tenant>/batches/<id>/run/...     the batcher's own (:mod:`batches.steps.run_folder`), removed soon after the end
    live/<tenant>~<id>                the live mark: an empty object for each batch that has not ended
    ended/<seconds>~<tenant>~<id>     an empty object for each batch that has, by the Unix time of its end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, ValidationError

from queue_schemas import Tenant
from telemetry import get_logger

from .names import BATCH, created_ms, folder_of, is_id, tenant_of
from .objects import ObjectStore

_LIVE = "live"
_ENDED = "ended"
_PARTS = ("request", "progress", "cancel")

MAX_CACHED = 10_000
"""Ended batches to cache in memory for lists, some KiB each."""

log = get_logger(__name__)


class BatchStatus(StrEnum):
    """The statuses of OpenAI's Batch API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED_STATUSES = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class OutputExpiry(_Record):
    """When the output and error files expire: ``seconds`` after their creation (``anchor`` is ``created_at``)."""

    anchor: str = "created_at"
    seconds: int


class BatchRequest(_Record):
    """The client's request. Times are Unix seconds."""

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
    """One error of a batch; ``line`` of its input counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchProgress(_Record):
    """The public progress. ``stamps`` are Unix seconds by the name of their field in the API (``in_progress_at``...);
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


class BatchEnd(BatchProgress):
    """The end of a batch, with its request: lists read nothing else of an ended batch. ``request`` is None if it could
    not be read when the batch ended."""

    request: BatchRequest | None = None
    cancel_asked_at: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch in its current state. ``cancel_asked_at`` is None unless a cancel was requested."""

    request: BatchRequest
    progress: BatchProgress
    cancel_asked_at: int | None

    @property
    def ended(self) -> bool:
        return self.progress.status in ENDED_STATUSES


class BatchStore:
    """The batches of all tenants. Errors as in :class:`ObjectStore`. Reads no clock."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._cache: dict[tuple[Tenant, str], Batch] = {}
        """Ended batches that lists have read: they do not change. Removed ones are not in the names that a list
        reads."""

    def create(self, request: BatchRequest) -> None:
        """Store a new batch. A crash midway leaves a mark without a batch, never a batch without a mark."""
        tenant = Tenant(request.tenant)
        self._store.put(_live(tenant, request.id), b"")
        self._store.put(self.name(tenant, request.id, "request"), request.model_dump_json().encode())

    def get(self, tenant: Tenant, batch_id: str) -> Batch | None:
        """The batch; None if the tenant has none with that id. Raises ``ValidationError`` if its request or end is
        damaged."""
        if not is_id(batch_id, BATCH):
            return None
        end = self._store.get(self.name(tenant, batch_id, "end"))
        if end is not None and (batch := _from_end(end)) is not None:
            return batch
        parts = self._store.get_many([self.name(tenant, batch_id, part) for part in _PARTS])
        return self._assembled(tenant, batch_id, end, parts)

    def _assembled(
        self, tenant: Tenant, batch_id: str, end: bytes | None, parts: Sequence[bytes | None]
    ) -> Batch | None:
        """The batch, of its end or else of its ``_PARTS``. Raises ``ValidationError``."""
        request_data, progress, cancel = parts
        if request_data is None:
            return None
        request = BatchRequest.model_validate_json(request_data)
        how = self._progress(tenant, batch_id, progress) if end is None else BatchProgress.model_validate_json(end)
        return Batch(request, how, _cancelled_at(cancel, request))

    def request(self, tenant: Tenant, batch_id: str) -> BatchRequest | None:
        """The request of a batch; None if it does not exist, or is damaged, which is logged: so that one damaged batch
        does not stop a sweep of all."""
        data = self._store.get(self.name(tenant, batch_id, "request")) if is_id(batch_id, BATCH) else None
        try:
            return None if data is None else BatchRequest.model_validate_json(data)
        except ValidationError as error:
            log.error("batch_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
            return None

    def page(self, tenant: Tenant, *, after: str = "", limit: int = 20) -> tuple[list[Batch], bool]:
        """Up to ``limit`` batches, newest first, that follow the one with the id ``after``; and whether there are
        more."""
        ids = [one for one in reversed(self._store.names(f"{folder_of(tenant)}/batches")) if not after or one < after]
        page: list[Batch] = []
        for first in range(0, len(ids), limit + 1):
            for batch in self._many(tenant, ids[first : first + limit + 1]):
                if len(page) == limit:
                    return page, True
                page.append(batch)
        return page, False

    def _many(self, tenant: Tenant, ids: Sequence[str]) -> list[Batch]:
        """Those of ``ids`` that are batches and can be read: one call for all ends, one for the parts of the others."""
        ids = [batch_id for batch_id in ids if is_id(batch_id, BATCH)]
        found: dict[str, Batch | None] = {one: known for one in ids if (known := self._cache.get((tenant, one)))}
        new = [batch_id for batch_id in ids if batch_id not in found]
        ends = dict(zip(new, self._store.get_many([self.name(tenant, one, "end") for one in new]), strict=True))
        for batch_id, end in ends.items():
            try:
                if end is not None and (whole := _from_end(end)) is not None:
                    found[batch_id] = whole
                    self._add_to_cache(tenant, whole)
            except ValidationError as error:
                found[batch_id] = None
                log.error("batch_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
        rest = [batch_id for batch_id in new if batch_id not in found]
        read = self._store.get_many([self.name(tenant, one, part) for one in rest for part in _PARTS])
        for place, batch_id in enumerate(rest):
            parts = read[place * len(_PARTS) : (place + 1) * len(_PARTS)]
            try:
                found[batch_id] = self._assembled(tenant, batch_id, ends[batch_id], parts)
            except ValidationError as error:
                log.error("batch_damaged", batch=batch_id, tenant=tenant, errors=error.error_count())
        return [batch for batch_id in ids if (batch := found.get(batch_id)) is not None]

    def _add_to_cache(self, tenant: Tenant, batch: Batch) -> None:
        while len(self._cache) >= MAX_CACHED:
            self._cache.pop(next(iter(self._cache), (tenant, "")), None)
        self._cache[tenant, batch.request.id] = batch

    def ask_to_cancel(self, tenant: Tenant, batch_id: str, at_s: int) -> None:
        """Request a cancel, which the batcher will notice. The first of several calls counts, as far as the store
        allows."""
        name = self.name(tenant, batch_id, "cancel")
        if self._store.get(name) is None:
            self._store.put(name, b"%d" % at_s)

    def set_progress(self, tenant: Tenant, batch_id: str, progress: BatchProgress) -> None:
        """Write the progress. Only the batcher calls this."""
        self._store.put(self.name(tenant, batch_id, "progress"), progress.model_dump_json().encode())

    def end(self, tenant: Tenant, batch_id: str, progress: BatchProgress) -> None:
        """Write the end; :meth:`unmark` the batch afterwards. Only the batcher calls this."""
        request = self.request(tenant, batch_id)
        cancelled = None
        if request is not None:
            cancelled = _cancelled_at(self._store.get(self.name(tenant, batch_id, "cancel")), request)
        ended_at_s = progress.stamps.get(f"{progress.status.value}_at", created_ms(batch_id) // 1000)
        self._store.put(f"{_ENDED}/{ended_at_s:012d}~{folder_of(tenant)}~{batch_id}", b"")
        end = BatchEnd(**dict(progress), request=request, cancel_asked_at=cancelled)
        self._store.put(self.name(tenant, batch_id, "end"), end.model_dump_json().encode())

    def remove_ended(self, before_s: float, max_count: int) -> int:
        """Remove up to ``max_count`` batches, of all tenants, that ended before that Unix time, oldest first; how many.

        May stop anywhere, and run in several processes at once. The batches' files stay until they expire.
        """
        removed = 0
        for name in self._store.names(_ENDED):
            at, _, rest = name.partition("~")
            folder, _, batch_id = rest.rpartition("~")
            if removed == max_count or not at.isdecimal() or not is_id(batch_id, BATCH):
                continue
            if int(at) >= before_s:
                break
            if self._store.get(_live(tenant_of(folder), batch_id)) is not None:
                continue  # its batcher died before it wrote the end, or has not finished the clean-up after it
            self._store.delete_below(f"{folder}/batches/{batch_id}")
            self._store.delete([f"{_ENDED}/{name}"])
            removed += 1
        return removed

    def live(self) -> list[tuple[Tenant, str]]:
        """Batches with a live mark, oldest first. One may not exist (yet)."""
        found = []
        for name in self._store.names(_LIVE):
            folder, _, batch_id = name.rpartition("~")
            found.append((tenant_of(folder), batch_id))
        return sorted(found, key=lambda batch: batch[1])

    def unmark(self, tenant: Tenant, batch_id: str) -> None:
        """Remove the live mark of a batch that has ended."""
        self._store.delete([_live(tenant, batch_id)])

    def _progress(self, tenant: Tenant, batch_id: str, data: bytes | None) -> BatchProgress:
        """Damaged progress counts as none: the batcher writes it again."""
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


def _from_end(end: bytes) -> Batch | None:
    """The batch, of its end alone; None if that lacks the request. Raises ``ValidationError``."""
    ended = BatchEnd.model_validate_json(end)
    if ended.request is None:
        return None
    progress = ended.model_dump(exclude={"request", "cancel_asked_at"})
    return Batch(ended.request, BatchProgress.model_validate(progress), ended.cancel_asked_at)


def _cancelled_at(cancel: bytes | None, request: BatchRequest) -> int | None:
    if cancel is None:
        return None
    return int(cancel) if cancel.isdigit() else request.created_at
