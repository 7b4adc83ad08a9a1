"""Enqueue a step of every live batch that has none.

This is how a batch begins (the Router only writes its record), and how it continues after the process that ran its step
died or Redis was emptied.
"""

from __future__ import annotations

import asyncio

from queue_schemas import InferqError, Tenant
from telemetry import get_logger
from telemetry.threads import in_thread

from .context import BatchContext
from .rq_jobs import StepQueue

ORPHAN_MS = 3_600_000
"""A mark of a batch that does not exist is removed after so long: its creation was cut short. The age of its id does
not tell, because with an idempotency key a batch has an id as old as the first try."""

log = get_logger(__name__)


class StepSweep:
    """Scans all live batches again and again. Several processes may do so at once."""

    def __init__(self, context: BatchContext, steps: StepQueue) -> None:
        self._context = context
        self._steps = steps
        self._seen: set[str] = set()
        self._missing: set[str] = set()
        self._orphans: dict[str, float] = {}
        """Marks without a batch, by the time in ms at which they were first seen."""
        self.fault = ""
        """Why the last sweep failed; empty if it succeeded."""

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await in_thread(self.once)
                self.fault = ""
            except InferqError as error:
                if error.message != self.fault:
                    log.warning("sweep_failed", error=error.message)
                self.fault = error.message
            await asyncio.sleep(self._context.settings.scan_interval_ms / 1000)

    def once(self) -> list[str]:
        """One sweep; the batches for which it enqueued a step. Blocks."""
        live = {batch_id: tenant for tenant, batch_id in self._context.batches.live()}
        self._context.metrics.live.set(len(live))
        waiting = self._steps.waiting()
        busy = self._steps.busy([batch_id for batch_id in live if batch_id not in waiting])
        missing = {batch_id for batch_id in live if batch_id not in waiting and batch_id not in busy}
        # One that was seen before may just be between the queue and its lock: it must be missing twice.
        due = [
            batch_id
            for batch_id in live
            if batch_id in missing and (batch_id in self._missing or batch_id not in self._seen)
        ]
        enqueued = [batch_id for batch_id in due if self._enqueue(live[batch_id], batch_id)]
        self._seen = set(live)
        self._orphans = {batch_id: since for batch_id, since in self._orphans.items() if batch_id in live}
        self._missing = missing - set(enqueued)
        return enqueued

    def _enqueue(self, tenant: Tenant, batch_id: str) -> bool:
        if self._context.batches.request(tenant, batch_id) is None:
            now_ms = self._context.now_s() * 1000
            if now_ms - self._orphans.setdefault(batch_id, now_ms) > ORPHAN_MS:
                self._context.batches.unmark(tenant, batch_id)
                log.info("orphan_mark_removed", batch=batch_id)
            return False
        if batch_id in self._seen:
            log.debug("batch_resumed", batch=batch_id)
        self._steps.put(tenant, batch_id, "next step", int(self._context.now_s() * 1000))
        return True
