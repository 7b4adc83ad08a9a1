"""Batches as the store has them: taking them in, once each, and finding, listing and cancelling them."""

from __future__ import annotations

from queue_schemas import BadRequest, Conflict, NotFound, OverCapacity, Tenant
from storage import Batch, Batches, BatchRequest, FileRecord, Files, OutputExpiry, new_batch_id
from telemetry import get_logger

from ..idempotency import Claim, Idempotency, Sent
from ..settings import RouterSettings
from .rules import BatchParams

INPUT_PURPOSE = "batch"
RETRY_AFTER_FULL_S = 30

log = get_logger(__name__)


class BatchService:
    """The batches of all tenants. All methods block: they are called in threads."""

    def __init__(
        self, settings: RouterSettings, input_bytes: int, files: Files, batches: Batches, idempotency: Idempotency
    ) -> None:
        """``input_bytes``: the largest input file."""
        self._idempotency = idempotency
        self._settings = settings
        self._input_bytes = input_bytes
        self._files = files
        self._batches = batches

    def create(self, tenant: Tenant, asked: BatchParams, sent: Sent, now_s: float) -> tuple[Batch, Claim]:
        """Take a batch in, or give the one that an earlier try of the same request left.

        Raises ``IdempotencyKeyReused`` for a key that was sent with another request.
        """
        claim = self._idempotency.claim(
            tenant, sent, "create batch", asked, new_batch_id(int(now_s * 1000)), int(now_s * 1000)
        )
        before = None if claim.first else self._batches.get(tenant, claim.record.result)
        if before is not None:
            return before, claim
        try:
            self._check(tenant, asked, now_s)
        except BaseException:
            self._idempotency.release(claim)
            raise
        now = int(now_s)
        expiry = asked.output_expiry_s
        request = BatchRequest(
            id=claim.record.result,
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
        return self.get(tenant, request.id), claim

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

    def _check(self, tenant: Tenant, asked: BatchParams, now_s: float) -> None:
        """Whether it may be taken in."""
        self._check_input(asked.input_file_id, self._files.get(tenant, asked.input_file_id, now_s))
        live = sum(1 for owner, _ in self._batches.live() if owner == tenant)
        if live >= self._settings.tenant_batches:
            raise OverCapacity(
                f"{live} batches of yours have not ended, the most there may be: wait for one, or cancel one",
                retry_after_s=RETRY_AFTER_FULL_S,
            )

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
