"""The file store: objects in a folder or bucket, and the files, batches and request records kept in them.

Its data survives the loss of Redis. Each object is written once, or by one writer only: object stores can neither
append nor compare and swap.
"""

from __future__ import annotations

from .batches import (
    ENDED_STATUSES,
    Batch,
    BatchError,
    BatchProgress,
    BatchRequest,
    BatchStatus,
    BatchStore,
    OutputExpiry,
)
from .failures import ObjectMissing
from .files import FileRecord, FileStore, Part, StorageUsage, Upload
from .idempotency_records import RequestRecord, RequestRecords
from .names import created_ms, folder_of, new_batch_id, new_file_id, tenant_of
from .objects import ObjectStore, Writer
from .settings import StorageSettings
from .sweep import sweep_expired, sweep_leftovers
from .writing import ObjectWriter

__all__ = [
    "ENDED_STATUSES",
    "Batch",
    "BatchError",
    "BatchProgress",
    "BatchRequest",
    "BatchStatus",
    "BatchStore",
    "FileRecord",
    "FileStore",
    "ObjectMissing",
    "ObjectStore",
    "ObjectWriter",
    "OutputExpiry",
    "Part",
    "RequestRecord",
    "RequestRecords",
    "StorageSettings",
    "StorageUsage",
    "Upload",
    "Writer",
    "created_ms",
    "folder_of",
    "new_batch_id",
    "new_file_id",
    "sweep_expired",
    "sweep_leftovers",
    "tenant_of",
]
