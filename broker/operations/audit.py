"""Comparing what the queue counts with what is there, a little at a time, beside the sweep of each second.

Counters and records differ once Redis has evicted keys, or somebody has deleted some. Unless that is mended, the number
of waiting jobs never falls to zero, and an autoscaler that reads it never scales down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from queue_schemas import ShardKeys
from telemetry import get_logger

from ..redis.calls import Caller

EVERY_S = 5.0
"""How often a part of a shard is looked at."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the next audit of a shard goes on, and when that is due."""

    due_at: float = 0.0
    jobs: bytes = b"0"
    workers: bytes = b"0"
    place: int = 0


class Auditor:
    """Audits each shard a part at a time, when it is due."""

    def __init__(self, caller: Caller, clock: Callable[[], float] = time.monotonic) -> None:
        self._caller = caller
        self._clock = clock
        self._places: dict[int, _Place] = {}

    async def audit_next_part(self, keys: ShardKeys) -> int:
        """Audit the next part of a shard, if that is due: how many records, entries and counters were mended."""
        now, place = self._clock(), self._places.get(keys.shard, _Place())
        if now < place.due_at:
            return 0
        jobs, workers, number, mended = await self._caller.script(
            "audit", keys.budget, keys.prefix, place.jobs, place.workers, place.place
        )
        if mended:
            log.warning("queue_mended", shard=keys.shard, mended=mended, why="keys were evicted or deleted in Redis")
        # What is found to be wrong once is looked at without a pause.
        self._places[keys.shard] = _Place(now if mended else now + EVERY_S, jobs, workers, int(number))
        return int(mended)
