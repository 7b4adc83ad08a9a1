"""Batch work: validating, running and finishing batches over the queue, as RQ jobs; delivering webhooks."""

from __future__ import annotations

from .settings import BatchSettings

__all__ = ["BatchSettings"]
