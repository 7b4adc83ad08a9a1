"""``RecentDepths`` reads the queue's depths for the pages of pools, at most four times a second for all who ask."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from queue_schemas import Lane, LaneDepth, Pool

from ..queue_link import QueueLink

MAX_AGE_S = 0.25
"""Reading them takes the queue's server a time that grows with models: no stranger decides how often."""

Depths = Mapping[Pool, Mapping[Lane, LaneDepth]]


class RecentDepths:
    """Depths per pool and lane, up to ``MAX_AGE_S`` old. Those who ask at once share one read."""

    def __init__(self, link: QueueLink) -> None:
        self._link = link
        self._read: asyncio.Task[Depths] | None = None
        self._asked_s = 0.0

    async def get(self) -> Depths:
        """The depths. Raises ``BrokerUnavailable``; an error is not kept."""
        queue, now = self._link.ready_queue(), asyncio.get_running_loop().time()
        read = self._read
        is_spoilt = read is not None and read.done() and (read.cancelled() or read.exception() is not None)
        if read is None or is_spoilt or now - self._asked_s >= MAX_AGE_S:
            self._asked_s = now
            read = self._read = asyncio.create_task(queue.stats.depths(), name="depths")
        # A caller may leave, which must not end the read of the others.
        return await asyncio.shield(read)
