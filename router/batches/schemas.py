"""A batch as the vendor's API shows it (``openai.types.Batch``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storage import Batch, BatchStatus

_STAMPS = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)


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


def batch_list(page: Sequence[Batch], *, more: bool) -> dict[str, Any]:
    """A page of them, newest first."""
    data = [batch_object(batch) for batch in page]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": more}


def shown_status(batch: Batch) -> BatchStatus:
    """What the batcher says, but for a cancel that it has not noticed yet."""
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
