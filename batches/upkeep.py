"""The file store's upkeep: what expired, and what processes left that died, is removed by whoever runs all the time.

Several batchers may do so at once.
"""

from __future__ import annotations

import asyncio

from queue_schemas import InferqError
from storage import sweep_expired, sweep_leftovers
from telemetry import get_logger

from .context import Desk, in_thread
from .core import file_of

LEFTOVERS_EVERY_S = 3_600.0
MOST_BATCHES = 1_000
"""How many ended batches one look removes: each costs some calls to the store."""

log = get_logger(__name__)


class Upkeep:
    """Removes files whose time is over, but those that a live batch reads or writes, ended batches, and leftovers once
    an hour."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._leftovers_at_s = desk.tick_s() + LEFTOVERS_EVERY_S

    async def run(self) -> None:
        """Until cancelled. A store that cannot be used is the sweep's to tell of."""
        while True:
            await asyncio.sleep(self._desk.settings.expiry_scan_ms / 1000)
            try:
                await in_thread(self.once)
            except InferqError as error:
                log.warning("upkeep_failed", error=error.message, then="it is tried again")

    def once(self) -> None:
        """One look. Blocks."""
        desk, now_s = self._desk, self._desk.now_s()
        in_use = self._in_use()
        sweep_expired(desk.files, now_s, in_use)
        if keep_s := desk.settings.keep_batches_s:
            removed = desk.batches.forget_ended(now_s - keep_s, MOST_BATCHES)
            if removed:
                log.info("ended_batches_removed", batches=removed, after_s=keep_s)
        if desk.tick_s() >= self._leftovers_at_s:
            self._leftovers_at_s = desk.tick_s() + LEFTOVERS_EVERY_S
            sweep_leftovers(desk.files, now_s, in_use)

    def _in_use(self) -> set[str]:
        """The files of batches that have not ended: their inputs, and their outputs that are being written."""
        found = set()
        for tenant, batch_id in self._desk.batches.live():
            found |= {file_of(batch_id, kind) for kind in ("output", "error")}
            asked = self._desk.batches.asked(tenant, batch_id)
            if asked is not None:
                found.add(asked.input_file_id)
        return found
