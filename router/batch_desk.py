"""Batches as the store has them: taking them in, once each, and finding, listing and cancelling them."""

from __future__ import annotations

from queue_schemas import BadRequest, Conflict, IdempotencyKeyReused, NotFound, OverCapacity, Tenant
from storage import Batch, Batches, BatchRequest, FileRecord, Files, OutputExpiry, new_batch_id
from telemetry import get_logger

from .core import IDEMPOTENCY_HEADER
from .core.batches import BatchAsked, keyed_batch_id
from .settings import RouterSettings

INPUT_PURPOSE = "batch"
RETRY_AFTER_FULL_S = 30
_REPEATS_WITHIN_S = 660
"""Longer than the SDK waits for an answer (600 s) before it repeats itself."""
_REPEATS_AMONG = 20

log = get_logger(__name__)


class BatchDesk:
    """The batches of all tenants. All methods block: they are called in threads."""

    def __init__(self, settings: RouterSettings, input_bytes: int, files: Files, batches: Batches) -> None:
        """``input_bytes``: the largest input file."""
        self._settings = settings
        self._input_bytes = input_bytes
        self._files = files
        self._batches = batches

    def create(self, tenant: Tenant, asked: BatchAsked, *, key: str, repeated: bool, now_s: float) -> Batch:
        """Take a batch in, or give the one that an earlier try of the same request left."""
        before = self._earlier(tenant, asked, key=key, repeated=repeated, now_s=now_s)
        if before is not None:
            return before
        self._check_input(asked.input_file_id, self._files.get(tenant, asked.input_file_id, now_s))
        live = sum(1 for owner, _ in self._batches.live() if owner == tenant)
        if live >= self._settings.tenant_batches:
            raise OverCapacity(
                f"{live} batches of yours have not ended, the most there may be: wait for one, or cancel one",
                retry_after_s=RETRY_AFTER_FULL_S,
            )
        now = int(now_s)
        expiry = asked.output_expiry_s
        request = BatchRequest(
            id=(keyed_batch_id(tenant, key, asked.input_file_id) if key else "") or new_batch_id(int(now_s * 1000)),
            tenant=tenant,
            input_file_id=asked.input_file_id,
            endpoint=asked.endpoint,
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + asked.window_s,
            metadata=asked.metadata,
            output_expires_after=None if expiry is None else OutputExpiry(seconds=expiry),
        )
        self._batches.create(request)
        log.info("batch_created", batch_id=request.id, tenant=tenant, endpoint=request.endpoint)
        return self.get(tenant, request.id)

    def get(self, tenant: Tenant, batch_id: str) -> Batch:
        found = self._batches.get(tenant, batch_id)
        if found is None:
            raise NotFound(f"there is no batch {batch_id[:80]!r} of yours", param="batch_id")
        return found

    def cancel(self, tenant: Tenant, batch_id: str, now_s: float) -> Batch:
        """Ask for its end. Raises ``Conflict`` if it has ended otherwise than by an earlier cancel."""
        batch = self.get(tenant, batch_id)
        if batch.ended:
            raise Conflict(f"the batch has ended ({batch.progress.status}): there is nothing left to cancel")
        if batch.cancel_asked_at is None:
            self._batches.ask_to_cancel(tenant, batch_id, int(now_s))
            log.info("batch_cancel_asked", batch_id=batch_id, tenant=tenant)
        return self.get(tenant, batch_id)

    def page(self, tenant: Tenant, after: str, limit: int) -> tuple[list[Batch], bool]:
        return self._batches.page(tenant, after=after, limit=limit)

    def _earlier(self, tenant: Tenant, asked: BatchAsked, *, key: str, repeated: bool, now_s: float) -> Batch | None:
        if key:
            batch_id = keyed_batch_id(tenant, key, asked.input_file_id)
            found = self._batches.get(tenant, batch_id) if batch_id else None
            if found is not None and not _same(found.request, asked):
                raise IdempotencyKeyReused(
                    f"this {IDEMPOTENCY_HEADER} belongs to another batch of the same file: send a new key, "
                    "or the same request",
                    param=IDEMPOTENCY_HEADER,
                )
            return found
        if not repeated:
            return None
        newest, _ = self._batches.page(tenant, limit=_REPEATS_AMONG)
        recent = [batch for batch in newest if batch.request.created_at >= now_s - _REPEATS_WITHIN_S]
        return next((batch for batch in recent if _same(batch.request, asked)), None)

    def _check_input(self, file_id: str, record: FileRecord | None) -> None:
        param, most = "input_file_id", self._input_bytes
        if record is None:
            raise BadRequest(f"there is no file {file_id[:80]!r} of yours: upload it with POST /v1/files", param=param)
        if record.purpose != INPUT_PURPOSE:
            raise BadRequest(
                f"the file was uploaded with purpose {record.purpose!r}: upload it with purpose {INPUT_PURPOSE!r}",
                param=param,
            )
        if record.bytes == 0:
            raise BadRequest("the file is empty: a batch needs at least one line", param=param)
        if record.bytes > most:
            raise BadRequest(
                f"the file has {record.bytes} bytes, more than the {most} of a batch: split it into several",
                param=param,
            )


def _same(request: BatchRequest, asked: BatchAsked) -> bool:
    expiry = request.output_expires_after
    return (
        request.input_file_id == asked.input_file_id
        and request.endpoint == asked.endpoint
        and request.completion_window == asked.completion_window
        and request.metadata == asked.metadata
        and (None if expiry is None else expiry.seconds) == asked.output_expiry_s
    )
