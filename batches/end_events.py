"""What is to be done once a batch has ended, beside what the batch itself needs.

Called after its end stands in the store and before its mark is taken away: whoever dies in between calls it again. So
whatever it does must come out the same when it is done twice (an event's id is made from the batch's).
"""

from __future__ import annotations

from queue_schemas import Tenant
from storage import Batch, ObjectStore
from webhooks.delivery_store import DeliveryStore
from webhooks.events import WebhookEvent


def batch_ended(store: ObjectStore, batch: Batch) -> None:
    """Tell who wants to know that ``batch`` has ended; ``batch.progress.status`` says how. Blocks. Raises
    ``StoreUnavailable`` or ``StoreFull`` if it cannot now: it is called again."""
    request, status = batch.request, batch.progress.status.value
    ended_at_s = batch.progress.stamps.get(f"{status}_at", request.created_at)
    DeliveryStore(store).emit(WebhookEvent.of(Tenant(request.tenant), f"batch.{status}", request.id, ended_at_s))
