"""A batch's end is told to the webhook endpoints of its tenant, as one event however often it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from batches.batch_events import emit_batch_ended
from queue_schemas import Tenant
from storage import ENDED_STATUSES, Batch, BatchProgress, BatchRequest, BatchStatus, ObjectStore, StorageSettings
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import EVENT_TYPES

ACME = Tenant("acme")


@pytest.mark.parametrize("status", sorted(ENDED_STATUSES))
def test_a_batch_that_ended_is_one_event(tmp_path: Path, status: BatchStatus) -> None:
    """Of the type that its status says, at the time of its end; told again after a crash it is the same."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))
    record = EndpointRecord(
        id=new_endpoint_id(1), tenant=ACME, url="u", events=("*",), created_at=1, updated_at=1, enabled_at_ms=1
    )
    EndpointStore(store).create(record, Secrets.fresh(1))
    request = BatchRequest(
        id="batch_" + "0" * 32,
        tenant=ACME,
        input_file_id="f",
        endpoint="e",
        completion_window="24h",
        created_at=5,
        expires_at=9,
    )
    batch = Batch(request, BatchProgress(status=status, stamps={f"{status}_at": 7}), None)
    emit_batch_ended(store, batch)
    emit_batch_ended(store, batch)
    (key,) = DeliveryStore(store).pending()
    event = DeliveryStore(store).event(key)
    assert event is not None
    assert (event.type, event.object_id, event.created_at) == (f"batch.{status}", request.id, 7)
    assert event.type in EVENT_TYPES
