"""Emit the webhook event of a batch that has ended.

Called after its end is stored and before its live mark is removed: after a crash in between it is called again, and
makes the same event, because an event's id is made from the batch's.
"""

from __future__ import annotations

from queue_schemas import Tenant
from storage import Batch, ObjectStore
from webhooks.delivery_store import DeliveryStore
from webhooks.events import WebhookEvent


def emit_batch_ended(store: ObjectStore, batch: Batch) -> None:
    """Queue an event for every endpoint that is subscribed to this end (``batch.progress.status``). Blocks.

    Raises ``StoreUnavailable`` or ``StoreFull``: call it again then.
    """
    request, status = batch.request, batch.progress.status.value
    ended_at_s = batch.progress.stamps.get(f"{status}_at", request.created_at)
    DeliveryStore(store).emit(WebhookEvent.of(Tenant(request.tenant), f"batch.{status}", request.id, ended_at_s))
