"""Remove what has expired from the file store: files, ended batches, and leftovers of processes that died.

Several batchers may do so at once.
"""

from __future__ import annotations

import asyncio

from queue_schemas import InferqError
from storage import sweep_expired, sweep_leftovers
from telemetry import get_logger
from telemetry.threads import in_thread

from .context import BatchContext
from .core import file_of

LEFTOVERS_EVERY_S = 3_600.0
MAX_BATCHES = 1_000
"""How many ended batches one sweep removes: each costs some calls to the store."""

log = get_logger(__name__)


class ExpirySweep:
    """Removes expired files, except those that a live batch reads or writes; ended batches; leftovers once an hour."""

    def __init__(self, context: BatchContext) -> None:
        self._context = context
        self._leftovers_at_s = context.tick_s() + LEFTOVERS_EVERY_S

    async def run(self) -> None:
        """Sweep until cancelled. The step sweep reports a store that is unavailable."""
        while True:
            await asyncio.sleep(self._context.settings.expiry_interval_ms / 1000)
            try:
                await in_thread(self.once)
            except InferqError as error:
                log.warning("expiry_sweep_failed", error=error.message, then="it is tried again")

    def once(self) -> None:
        """One sweep. Blocks."""
        context, now_s = self._context, self._context.now_s()
        in_use = self._in_use()
        sweep_expired(context.files, now_s, in_use)
        if keep_s := context.settings.keep_ended_s:
            removed = context.batches.remove_ended(now_s - keep_s, MAX_BATCHES)
            if removed:
                log.info("ended_batches_removed", batches=removed, after_s=keep_s)
        if context.tick_s() >= self._leftovers_at_s:
            self._leftovers_at_s = context.tick_s() + LEFTOVERS_EVERY_S
            sweep_leftovers(context.files, now_s, in_use)

    def _in_use(self) -> set[str]:
        """Ids of the files of live batches: their inputs, and the outputs that are being written."""
        found = set()
        for tenant, batch_id in self._context.batches.live():
            found |= {file_of(batch_id, kind) for kind in ("output", "error")}
            request = self._context.batches.request(tenant, batch_id)
            if request is not None:
                found.add(request.input_file_id)
        return found
