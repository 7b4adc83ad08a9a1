"""Check whether a notifier sends webhooks."""

from __future__ import annotations

import time

from inferq.client import RequestFailed
from inferq.webhooks.client import ENDPOINTS_PATH, DeliveryView, EndpointView

from .findings import DoctorTarget, Finding, Level

MAX_WAIT_S = 60
"""A notifier starts due deliveries within seconds: an event without an attempt for longer has no notifier."""


async def check_webhooks(examined: DoctorTarget) -> list[Finding]:
    """Check for webhook endpoints that are disabled or fail."""
    async with examined.client as client:
        if not await client.health():
            return []
        try:
            endpoints = await client.get_all(ENDPOINTS_PATH, EndpointView, 100)
            newest = [
                delivery
                for endpoint in endpoints
                for delivery in await client.get_all(f"{ENDPOINTS_PATH}/{endpoint.id}/deliveries", DeliveryView, 20)
            ]
        except RequestFailed as refused:
            if refused.http_status in (401, 404):
                return []  # the check of the fabric reports it
            fix = "check INFERQ_STORAGE_URL of the Routers, and the store behind it"
            return [Finding("webhooks", Level.FAILURE, refused.message, fix)]
    waiting = [one for one in newest if one.status == "pending" and not one.attempts]
    max_s = max((time.time() - one.created_at for one in waiting), default=0.0)
    if max_s > MAX_WAIT_S:
        text = f"{len(waiting)} events have waited up to {max_s:.0f} s for a notifier"
        fix = "start `inferq notifier`, or look at the log of the one that runs"
        return [Finding("webhooks", Level.WARNING, text, fix)]
    disabled = sum(endpoint.status == "disabled" for endpoint in endpoints)
    return [Finding("webhooks", Level.OK, f"{len(endpoints)} endpoints, {disabled} of them disabled")]
