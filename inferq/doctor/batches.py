"""Check whether a batcher runs batches."""

from __future__ import annotations

import time

from inferq.batch.client import BatchView
from inferq.client import RequestFailed

from .findings import DoctorTarget, Finding, Level

MAX_START_S = 60
"""A batcher looks for new batches every second: a batch that waits longer has no batcher."""


async def check_batches(examined: DoctorTarget) -> list[Finding]:
    """Check whether batches make progress."""
    async with examined.client as client:
        if not await client.health():
            return []
        try:
            newest = await client.get_all("/v1/batches", BatchView, 100)
        except RequestFailed as refused:
            if refused.http_status in (401, 404):
                return []  # the check of the fabric reports it
            fix = "check INFERQ_STORAGE_URL of the Routers, and the store behind it"
            return [Finding("batches", Level.FAILURE, refused.message, fix)]
    now_s = time.time()
    live = [batch for batch in newest if not batch.ended]
    waiting = [batch for batch in live if batch.status == "validating" and now_s - batch.created_at > MAX_START_S]
    if waiting:
        since_s = max(now_s - batch.created_at for batch in waiting)
        text = f"{len(waiting)} batches have waited up to {since_s:.0f} s for a batcher"
        return [
            Finding("batches", Level.WARNING, text, "start `inferq batcher`, or look at the log of the one that runs")
        ]
    return [Finding("batches", Level.OK, f"{len(live)} of the newest {len(newest)} batches have not ended")]
