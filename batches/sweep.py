"""The sweep: every batch that has not ended has its next step on the queue, soon.

It is how a batch begins (the Router writes its record and tells nobody) and how it comes back when the process that ran
its step died, or Redis was emptied.
"""

from __future__ import annotations

import asyncio

from queue_schemas import InferqError, Tenant
from telemetry import get_logger
from telemetry.threads import in_thread

from .context import BatchContext
from .rq_jobs import StepQueue

STRAY_MS = 3_600_000
"""A mark without a batch is removed once it was seen for so long: whoever made it did not get further. Its id does not
tell: under an idempotency key a batch has an id as old as its first try."""

log = get_logger(__name__)


class Sweep:
    """Looks at all live batches, again and again. Several processes may do so at once."""

    def __init__(self, context: BatchContext, steps: StepQueue) -> None:
        self._context = context
        self._steps = steps
        self._seen: set[str] = set()
        self._missing: set[str] = set()
        self._stray: dict[str, float] = {}
        """Marks without a batch, by when they were first seen, in ms."""
        self.fault = ""
        """Why the last one could not be done; empty: it could."""

    async def run(self) -> None:
        """Until cancelled."""
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
        """One sweep; the batches that it gave a step. Blocks."""
        live = {batch_id: tenant for tenant, batch_id in self._context.batches.live()}
        self._context.metrics.live.set(len(live))
        waiting = self._steps.waiting()
        held = self._steps.busy([batch_id for batch_id in live if batch_id not in waiting])
        missing = {batch_id for batch_id in live if batch_id not in waiting and batch_id not in held}
        # One that was seen before may just be between the queue and its lock: it is looked at once more.
        due = [
            batch_id
            for batch_id in live
            if batch_id in missing and (batch_id in self._missing or batch_id not in self._seen)
        ]
        given = [batch_id for batch_id in due if self._give(live[batch_id], batch_id)]
        self._seen = set(live)
        self._stray = {batch_id: since for batch_id, since in self._stray.items() if batch_id in live}
        self._missing = missing - set(given)
        return given

    def _give(self, tenant: Tenant, batch_id: str) -> bool:
        if self._context.batches.asked(tenant, batch_id) is None:
            now_ms = self._context.now_s() * 1000
            if now_ms - self._stray.setdefault(batch_id, now_ms) > STRAY_MS:
                self._context.batches.retire(tenant, batch_id)
                log.info("stray_mark_removed", batch=batch_id)
            return False
        if batch_id in self._seen:
            log.debug("batch_taken_up_again", batch=batch_id)
        self._steps.put(tenant, batch_id, "next step", int(self._context.now_s() * 1000))
        return True
