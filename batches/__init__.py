"""The batcher: validate, run and finish the batches in the file store, step by step, as RQ jobs."""

from __future__ import annotations

from .settings import BatchSettings

__all__ = ["BatchSettings"]
