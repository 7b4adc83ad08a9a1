"""Creates, finds, lists and cancels batches in the store; the batcher runs them."""

from __future__ import annotations

from openai_api.batch_windows import window_seconds
from queue_schemas import Conflict, NotFound, OverCapacity, Tenant
from storage import Batch, BatchRequest, BatchStore, FileStore, OutputExpiry, new_batch_id
from telemetry import get_logger

from ..idempotency import Execution, Idempotency, RequestKey
from .rules import check_input_file
from .schemas import BatchCreate

RETRY_AFTER_FULL_S = 30

log = get_logger(__name__)


class BatchService:
    """The batches of all tenants. All methods block: call them in threads."""

    def __init__(
        self, files: FileStore, batches: BatchStore, idempotency: Idempotency, *, max_input_bytes: int, max_live: int
    ) -> None:
        """``max_input_bytes``: the largest input file; ``max_live``: batches of one tenant that have not ended."""
        self._files = files
        self._batches = batches
        self._idempotency = idempotency
        self._max_input_bytes = max_input_bytes
        self._max_live = max_live

    def create(self, tenant: Tenant, params: BatchCreate, key: RequestKey, now_s: float) -> tuple[Batch, Execution]:
        """A new batch, or the one that an earlier try of the same request made.

        Raises ``BadRequest``, ``OverCapacity``, and ``IdempotencyKeyReused`` for a key of another request.
        """
        now_ms, now = int(now_s * 1000), int(now_s)
        execution = self._idempotency.begin(
            tenant, key, "create batch", params.model_dump(), new_batch_id(now_ms), now_ms
        )
        before = None if execution.is_first else self._batches.get(tenant, execution.result)
        if before is not None:
            return before, execution
        try:
            self._check(tenant, params, now_s)
        except BaseException:
            self._idempotency.abandon(execution)
            raise
        expiry = params.output_expires_after
        request = BatchRequest(
            id=execution.result,
            tenant=tenant,
            input_file_id=params.input_file_id,
            endpoint=params.endpoint,
            completion_window=params.completion_window,
            created_at=now,
            expires_at=now + window_seconds(params.completion_window),
            metadata=params.metadata,
            output_expires_after=None if expiry is None else OutputExpiry(seconds=expiry.seconds),
        )
        self._batches.create(request)
        log.info("batch_created", batch_id=request.id, tenant=tenant, endpoint=request.endpoint)
        return self.get(tenant, request.id), execution

    def get(self, tenant: Tenant, batch_id: str) -> Batch:
        """Raises ``NotFound``."""
        found = self._batches.get(tenant, batch_id)
        if found is None:
            raise NotFound(f"no batch {batch_id[:80]!r} found for this API key", param="batch_id")
        return found

    def cancel(self, tenant: Tenant, batch_id: str, now_s: float) -> Batch:
        """Ask the batcher to end it. Raises ``NotFound``, and ``Conflict`` if it has ended."""
        batch = self.get(tenant, batch_id)
        if batch.ended:
            raise Conflict(f"the batch has ended ({batch.progress.status}): there is nothing left to cancel")
        if batch.cancel_asked_at is None:
            self._batches.ask_to_cancel(tenant, batch_id, int(now_s))
            log.info("batch_cancel_requested", batch_id=batch_id, tenant=tenant)
        return self.get(tenant, batch_id)

    def page(self, tenant: Tenant, after: str, limit: int) -> tuple[list[Batch], bool]:
        """Newest first, behind the one called ``after``, and whether there are more."""
        return self._batches.page(tenant, after=after, limit=limit)

    def _check(self, tenant: Tenant, params: BatchCreate, now_s: float) -> None:
        record = self._files.get(tenant, params.input_file_id, now_s)
        check_input_file(params.input_file_id, record, self._max_input_bytes)
        live = sum(1 for owner, _ in self._batches.live() if owner == tenant)
        if live >= self._max_live:
            raise OverCapacity(
                f"{live} batches of this API key have not ended, the most there may be: wait for one, or cancel one",
                retry_after_s=RETRY_AFTER_FULL_S,
            )
