"""Batches as they lie in the store: what was asked, whether it is to be cancelled, and how far it has come.

Each object has one writer. The Router writes ``request`` (once) and ``cancel`` (once); the batcher ``progress`` and,
once, ``end``, and what it keeps below ``run/``. What has ended stays so: ``end`` goes before whatever a batcher that
was late may still write to ``progress``.

::

    <tenant>/batches/<id>/request     BatchRequest
    <tenant>/batches/<id>/cancel      the Unix time at which it was asked to be cancelled, as text
    <tenant>/batches/<id>/progress    BatchProgress; none until the batcher has looked at it
    <tenant>/batches/<id>/end         BatchEnd of a batch that has ended: all that there is to tell of it
    <tenant>/batches/<id>/run/...     the batcher's own (:mod:`batches`), gone soon after the end
    live/<tenant>~<id>                an empty object for each batch that has not ended
    ended/<seconds>~<tenant>~<id>     an empty object for each that has, by the Unix time of its end
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

MAX_REMEMBERED = 10_000
"""Ended batches that are kept in memory for lists, some KiB each."""

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


class BatchEnd(BatchProgress):
    """How a batch has ended, with what was asked: lists of batches read nothing else of it. ``request`` is None
    if it could not be read then, or in the records of a version that did not keep it here."""

    request: BatchRequest | None = None
    cancel_asked_at: int | None = None


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
        self._ended: dict[tuple[Tenant, str], Batch] = {}
        """Read before, for lists: what has ended changes no more. Those that are removed are not in a list's names."""

    def create(self, request: BatchRequest) -> None:
        """Take a batch in. Whoever dies midway leaves a mark without a batch, never a batch without a mark."""
        tenant = Tenant(request.tenant)
        self._store.put(_live(tenant, request.id), b"")
        self._store.put(self.name(tenant, request.id, "request"), request.model_dump_json().encode())

    def get(self, tenant: Tenant, batch_id: str) -> Batch | None:
        """The batch; None if the tenant has none of that id. Raises ``ValidationError`` if what was asked, or its end,
        is damaged."""
        if not is_id(batch_id, BATCH):
            return None
        end = self._store.get(self.name(tenant, batch_id, "end"))
        if end is not None and (batch := _whole(end)) is not None:
            return batch
        parts = self._store.get_many([self.name(tenant, batch_id, part) for part in _PARTS])
        return self._assembled(tenant, batch_id, end, parts)

    def _assembled(
        self, tenant: Tenant, batch_id: str, end: bytes | None, parts: Sequence[bytes | None]
    ) -> Batch | None:
        """The batch of its end, or else of its ``_PARTS``. Raises ``ValidationError``."""
        asked, progress, cancel = parts
        if asked is None:
            return None
        request = BatchRequest.model_validate_json(asked)
        how = self._progress(tenant, batch_id, progress) if end is None else BatchProgress.model_validate_json(end)
        return Batch(request, how, _cancelled_at(cancel, request))

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
        ids = [one for one in reversed(self._store.names(f"{folder_of(tenant)}/batches")) if not after or one < after]
        page: list[Batch] = []
        for first in range(0, len(ids), limit + 1):
            for batch in self._many(tenant, ids[first : first + limit + 1]):
                if len(page) == limit:
                    return page, True
                page.append(batch)
        return page, False

    def _many(self, tenant: Tenant, ids: Sequence[str]) -> list[Batch]:
        """Those of ``ids`` that are batches and can be read: one call for all ends, one for the rest of the others."""
        ids = [batch_id for batch_id in ids if is_id(batch_id, BATCH)]
        found: dict[str, Batch | None] = {one: known for one in ids if (known := self._ended.get((tenant, one)))}
        new = [batch_id for batch_id in ids if batch_id not in found]
        ends = dict(zip(new, self._store.get_many([self.name(tenant, one, "end") for one in new]), strict=True))
        for batch_id, end in ends.items():
            try:
                if end is not None and (whole := _whole(end)) is not None:
                    found[batch_id] = whole
                    self._remember(tenant, whole)
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

    def _remember(self, tenant: Tenant, batch: Batch) -> None:
        while len(self._ended) >= MAX_REMEMBERED:
            self._ended.pop(next(iter(self._ended), (tenant, "")), None)
        self._ended[tenant, batch.request.id] = batch

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
        asked = self.asked(tenant, batch_id)
        cancelled = None
        if asked is not None:
            cancelled = _cancelled_at(self._store.get(self.name(tenant, batch_id, "cancel")), asked)
        ended_at_s = progress.stamps.get(f"{progress.status.value}_at", created_ms(batch_id) // 1000)
        self._store.put(f"{_ENDED}/{ended_at_s:012d}~{folder_of(tenant)}~{batch_id}", b"")
        end = BatchEnd(**dict(progress), request=asked, cancel_asked_at=cancelled)
        self._store.put(self.name(tenant, batch_id, "end"), end.model_dump_json().encode())

    def forget_ended(self, before_s: float, most: int) -> int:
        """Remove up to ``most`` batches, of all tenants, that ended before then, oldest first; how many. May be broken
        off anywhere, and done by several at once. Their files are kept for as long as those say themselves."""
        removed = 0
        for name in self._store.names(_ENDED):
            at, _, rest = name.partition("~")
            folder, _, batch_id = rest.rpartition("~")
            if removed == most or not at.isdecimal() or not is_id(batch_id, BATCH):
                continue
            if int(at) >= before_s:
                break
            if self._store.get(_live(tenant_of(folder), batch_id)) is not None:
                continue  # its batcher died just before it wrote the end, or has not done yet what follows it
            self._store.delete_below(f"{folder}/batches/{batch_id}")
            self._store.delete([f"{_ENDED}/{name}"])
            removed += 1
        return removed

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

    def _progress(self, tenant: Tenant, batch_id: str, data: bytes | None) -> BatchProgress:
        """What is damaged counts as none: the batcher writes it anew."""
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


def _whole(end: bytes) -> Batch | None:
    """The batch of its end alone; None if its request does not stand there. Raises ``ValidationError``."""
    ended = BatchEnd.model_validate_json(end)
    if ended.request is None:
        return None
    kept = ended.model_dump(exclude={"request", "cancel_asked_at"})
    return Batch(ended.request, BatchProgress.model_validate(kept), ended.cancel_asked_at)


def _cancelled_at(cancel: bytes | None, request: BatchRequest) -> int | None:
    if cancel is None:
        return None
    return int(cancel) if cancel.isdigit() else request.created_at
