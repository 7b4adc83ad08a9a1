"""Whether somebody works batches off."""

from __future__ import annotations

import time

from inferq.batch.client import BatchPage
from inferq.client import FabricRefused

from .findings import Examined, Finding, Level

MAX_START_S = 60
"""A batcher looks for new batches every second; one that nobody has looked at for so long has none."""


async def look_at_batches(examined: Examined) -> list[Finding]:
    """Check whether batches make progress."""
    async with examined.client as client:
        if not await client.health():
            return []
        try:
            page = client.parsed(BatchPage, await client.call("GET", "/v1/batches?limit=100"))
        except FabricRefused as refused:
            if refused.answered in (401, 404):
                return []  # told of by the look at the fabric; or a Router of before there were batches
            mend = "check INFERQ_STORAGE_URL of the Routers, and the store behind it"
            return [Finding("batches", Level.FAILURE, refused.message, mend)]
    now_s = time.time()
    live = [batch for batch in page.data if not batch.ended]
    waiting = [batch for batch in live if batch.status == "validating" and now_s - batch.created_at > MAX_START_S]
    if waiting:
        since_s = max(now_s - batch.created_at for batch in waiting)
        text = f"{len(waiting)} batches have waited up to {since_s:.0f} s for somebody to look at them"
        return [
            Finding("batches", Level.WARNING, text, "start `inferq batcher`, or look at the log of the one that runs")
        ]
    return [Finding("batches", Level.OK, f"{len(live)} of the newest {len(page.data)} batches have not ended")]
