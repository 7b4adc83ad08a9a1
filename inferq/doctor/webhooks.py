"""Whether somebody sends webhooks."""

from __future__ import annotations

import time

from inferq.client import FabricClient, FabricRefused
from inferq.webhooks.client import ENDPOINTS_PATH, DeliveryPage, DeliveryView, EndpointPage

from .findings import Examined, Finding, Level

MAX_WAIT_S = 60
"""A notifier begins what is due within seconds; an event that nobody began to send for so long has none."""


async def look_at_webhooks(examined: Examined) -> list[Finding]:
    """Check for webhook endpoints that are disabled or fail."""
    async with examined.client as client:
        if not await client.health():
            return []
        try:
            page = client.parsed(EndpointPage, await client.call("GET", f"{ENDPOINTS_PATH}?limit=100"))
            newest = [one for endpoint in page.data for one in await _deliveries(client, endpoint.id)]
        except FabricRefused as refused:
            if refused.answered in (401, 404):
                return []  # told of by the look at the fabric; or a Router of before there were webhooks
            mend = "check INFERQ_STORAGE_URL of the Routers, and the store behind it"
            return [Finding("webhooks", Level.FAILURE, refused.message, mend)]
    waiting = [one for one in newest if one.status == "pending" and not one.attempts]
    max_s = max((time.time() - one.created_at for one in waiting), default=0.0)
    if max_s > MAX_WAIT_S:
        text = f"{len(waiting)} events have waited up to {max_s:.0f} s for somebody to send them"
        mend = "start `inferq notifier`, or look at the log of the one that runs"
        return [Finding("webhooks", Level.WARNING, text, mend)]
    disabled = sum(endpoint.status == "disabled" for endpoint in page.data)
    return [Finding("webhooks", Level.OK, f"{len(page.data)} endpoints, {disabled} of them disabled")]


async def _deliveries(client: FabricClient, endpoint_id: str) -> list[DeliveryView]:
    answer = await client.call("GET", f"{ENDPOINTS_PATH}/{endpoint_id}/deliveries?limit=20")
    return client.parsed(DeliveryPage, answer).data
