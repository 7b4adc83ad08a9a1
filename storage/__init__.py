"""The file store: uploads, batches, webhooks and what became of them, as they lie in a folder or an object store.

What is here survives everything that Redis may lose. An object is written once, or by one writer only: stores of
objects can neither append nor compare and swap.
"""

from __future__ import annotations

from .batches import BATCH_ENDED, Batch, BatchError, Batches, BatchProgress, BatchRequest, BatchStatus, OutputExpiry
from .deliveries import Attempt, Deliveries, Delivery, DeliveryKey, DeliveryState, Outcome
from .failures import ObjectMissing
from .files import FileRecord, Files, Kept, Part, Upload
from .names import created_ms, folder_of, new_batch_id, new_endpoint_id, new_file_id, tenant_of
from .objects import ObjectStore, Writer
from .request_records import RequestRecord, RequestRecords
from .settings import StorageSettings
from .sweep import sweep_expired, sweep_leftovers
from .webhook_events import ALL_EVENTS, EVENT_TYPES, WebhookEvent
from .webhook_settings import WebhookSettings
from .webhook_urls import Address, Target, UrlRules, check_url
from .webhooks import Disabled, Endpoint, EndpointRecord, Secrets, Webhooks
from .writing import ObjectWriter

__all__ = [
    "ALL_EVENTS",
    "BATCH_ENDED",
    "EVENT_TYPES",
    "Address",
    "Attempt",
    "Batch",
    "BatchError",
    "BatchProgress",
    "BatchRequest",
    "BatchStatus",
    "Batches",
    "Deliveries",
    "Delivery",
    "DeliveryKey",
    "DeliveryState",
    "Disabled",
    "Endpoint",
    "EndpointRecord",
    "FileRecord",
    "Files",
    "Kept",
    "ObjectMissing",
    "ObjectStore",
    "ObjectWriter",
    "Outcome",
    "OutputExpiry",
    "Part",
    "RequestRecord",
    "RequestRecords",
    "Secrets",
    "StorageSettings",
    "Target",
    "Upload",
    "UrlRules",
    "WebhookEvent",
    "WebhookSettings",
    "Webhooks",
    "Writer",
    "check_url",
    "created_ms",
    "folder_of",
    "new_batch_id",
    "new_endpoint_id",
    "new_file_id",
    "sweep_expired",
    "sweep_leftovers",
    "tenant_of",
]
