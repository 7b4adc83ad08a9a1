"""Write the webhook event of a batch's end for the notifier; called by the step that ends the batch."""

from __future__ import annotations

from queue_schemas import Tenant
from storage import Batch, ObjectStore
from webhooks.delivery_store import DeliveryStore
from webhooks.events import WebhookEvent


def emit_batch_ended(store: ObjectStore, batch: Batch) -> None:
    """Queue a webhook event for every endpoint that is subscribed to this end (``batch.progress.status``). Blocks.

    Called after the end is stored and before the batch's live mark is removed: after a crash in between it is called
    again, and makes the same event, because an event's id is made from the batch's. Raises ``StoreUnavailable`` or
    ``StoreFull``: call it again then.
    """
    request, status = batch.request, batch.progress.status.value
    ended_at_s = batch.progress.stamps.get(f"{status}_at", request.created_at)
    DeliveryStore(store).emit(WebhookEvent.of(Tenant(request.tenant), f"batch.{status}", request.id, ended_at_s))
