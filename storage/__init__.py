"""The file store: uploads, batches and what became of them, as they lie in a folder or an object store.

What is here survives everything that Redis may lose. An object is written once, or by one writer only: stores of
objects can neither append nor compare and swap.
"""

from __future__ import annotations

from .batches import BATCH_ENDED, Batch, BatchError, Batches, BatchProgress, BatchRequest, BatchStatus, OutputExpiry
from .files import FileRecord, Files, Part, Upload
from .names import folder_of, new_batch_id, new_file_id, tenant_of
from .objects import ObjectMissing, ObjectStore, Writer
from .settings import StorageSettings

__all__ = [
    "BATCH_ENDED",
    "Batch",
    "BatchError",
    "BatchProgress",
    "BatchRequest",
    "BatchStatus",
    "Batches",
    "FileRecord",
    "Files",
    "ObjectMissing",
    "ObjectStore",
    "OutputExpiry",
    "Part",
    "StorageSettings",
    "Upload",
    "Writer",
    "folder_of",
    "new_batch_id",
    "new_file_id",
    "tenant_of",
]
