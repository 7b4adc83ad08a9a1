"""Batches as clients ask for them and see them (``openai.types.Batch``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from openai_api.metadata import check_metadata
from storage import Batch, BatchStatus

from ..http.json_body import RequestBody

MIN_EXPIRY_S, MAX_EXPIRY_S = 3_600, 2_592_000

_STAMPS = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)


class OutputExpiresAfter(RequestBody):
    """When the output and error files expire, counted from their creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class BatchCreate(RequestBody):
    """The body of ``POST /v1/batches``."""

    input_file_id: str = Field(min_length=1)
    endpoint: str = Field(min_length=1)
    completion_window: str = Field(min_length=1)
    metadata: Annotated[dict[str, str] | None, BeforeValidator(check_metadata)] = None
    output_expires_after: OutputExpiresAfter | None = None


def batch_object(batch: Batch) -> dict[str, Any]:
    """All fields; those that do not apply (yet) are null."""
    request, progress = batch.request, batch.progress
    stamps: dict[str, int | None] = {name: progress.stamps.get(name) for name in _STAMPS}
    if batch.cancel_asked_at is not None and (not batch.ended or progress.status is BatchStatus.CANCELLED):
        stamps["cancelling_at"] = stamps["cancelling_at"] or batch.cancel_asked_at
    return {
        "id": request.id,
        "object": "batch",
        "endpoint": request.endpoint,
        "model": progress.model,
        "errors": _errors(batch),
        "input_file_id": request.input_file_id,
        "completion_window": request.completion_window,
        "status": shown_status(batch).value,
        "output_file_id": progress.output_file_id,
        "error_file_id": progress.error_file_id,
        "created_at": request.created_at,
        "expires_at": request.expires_at,
        **stamps,
        "request_counts": {"total": progress.total, "completed": progress.completed, "failed": progress.failed},
        "usage": _usage(progress.usage),
        "metadata": request.metadata,
    }


def shown_status(batch: Batch) -> BatchStatus:
    """The status that the batcher wrote, or ``cancelling`` if it has not noticed a cancel yet."""
    cancelling = batch.cancel_asked_at is not None and not batch.ended
    return BatchStatus.CANCELLING if cancelling else batch.progress.status


def _errors(batch: Batch) -> dict[str, Any] | None:
    if not batch.progress.errors:
        return None
    return {"object": "list", "data": [error.model_dump() for error in batch.progress.errors]}


def _usage(usage: dict[str, int]) -> dict[str, Any] | None:
    if not usage:
        return None
    read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens", 0)},
        "total_tokens": usage.get("total_tokens", read + written),
    }
