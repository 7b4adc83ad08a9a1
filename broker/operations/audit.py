"""Compare the queue's counters with its records, a part at a time, after the sweep of each second; repair differences.

Counters and records differ once keys were evicted or deleted in Redis. Without repair the number of waiting jobs never
falls to zero, and an autoscaler that reads it never scales down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from queue_schemas import ShardKeys
from telemetry import get_logger

from ..redis.calls import Caller

INTERVAL_S = 5.0
"""How often a part of a shard is audited."""

log = get_logger(__name__)


class Auditor:
    """Audits each shard a part at a time, when it is due."""

    def __init__(self, caller: Caller, clock: Callable[[], float] = time.monotonic) -> None:
        self._caller = caller
        self._clock = clock
        self._next: dict[int, tuple[float, bytes]] = {}
        """By shard: when its next part is due, and the cursor with which that begins."""

    async def audit_next_part(self, keys: ShardKeys) -> int:
        """Audit the next part of a shard, if that is due. Returns how many records, entries and counters were
        repaired."""
        now = self._clock()
        due_at, cursor = self._next.get(keys.shard, (0.0, b"0"))
        if now < due_at:
            return 0
        cursor, repaired = await self._caller.script("audit", keys.budget, keys.prefix, cursor)
        if repaired:
            log.warning(
                "queue_repaired", shard=keys.shard, repaired=repaired, why="keys were evicted or deleted in Redis"
            )
        # A shard with differences is audited again without a pause.
        self._next[keys.shard] = (now if repaired else now + INTERVAL_S, cursor)
        return int(repaired)
