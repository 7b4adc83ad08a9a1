"""Compare the queue's counters with its records, a part at a time, after the sweep of each second; repair differences.

Counters and records differ once keys were evicted or deleted in Redis. Without repair the number of waiting jobs never
falls to zero, and an autoscaler that reads it never scales down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from queue_schemas import ShardKeys
from telemetry import get_logger

from ..redis.calls import Caller

INTERVAL_S = 5.0
"""How often a part of a shard is audited."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Position:
    """Where the next audit of a shard continues, and when it is due."""

    due_at: float = 0.0
    jobs: bytes = b"0"
    workers: bytes = b"0"
    queue: int = 0


class Auditor:
    """Audits each shard a part at a time, when it is due."""

    def __init__(self, caller: Caller, clock: Callable[[], float] = time.monotonic) -> None:
        self._caller = caller
        self._clock = clock
        self._positions: dict[int, _Position] = {}

    async def audit_next_part(self, keys: ShardKeys) -> int:
        """Audit the next part of a shard, if that is due. Returns how many records, entries and counters were
        repaired."""
        now, at = self._clock(), self._positions.get(keys.shard, _Position())
        if now < at.due_at:
            return 0
        jobs, workers, number, mended = await self._caller.script(
            "audit", keys.budget, keys.prefix, at.jobs, at.workers, at.queue
        )
        if mended:
            log.warning(
                "queue_repaired", shard=keys.shard, repaired=mended, why="keys were evicted or deleted in Redis"
            )
        # A shard with differences is audited again without a pause.
        self._positions[keys.shard] = _Position(now if mended else now + INTERVAL_S, jobs, workers, int(number))
        return int(mended)
