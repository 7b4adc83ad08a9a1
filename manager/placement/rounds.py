"""One round of all decisions on what workers load, on one reading of the queue's depths.

The acting Manager runs it with its sweeps. It asks the queue nothing where no worker could load anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from queue_schemas import LaneDepth, Pool
from queue_schemas.lanes import Lane

from ..ports import QueuePort, call_queue


@dataclass(frozen=True, slots=True)
class QueueState:
    """The queue in one round: its ``depths``, without the pools of shards that do not answer."""

    depths: Mapping[Pool, Mapping[Lane, LaneDepth]]
    _away: frozenset[int]
    _shard_of: Callable[[str], int]

    def is_away(self, pool: str) -> bool:
        """Whether the shard of ``pool`` does not answer."""
        return bool(self._away) and self._shard_of(pool) in self._away


@dataclass(slots=True)
class Unserved:
    """For how long jobs of pools have waited without a worker."""

    _since: dict[str, float] = field(default_factory=dict)

    def note(self, pools: Iterable[str], now: float) -> None:
        """Jobs of these wait without a worker, and of no others."""
        self._since = {pool: self._since.get(pool, now) for pool in pools}

    def for_s(self, pool: str, now: float) -> float:
        """Seconds; 0 for a pool that is served."""
        return now - self._since.get(pool, now)


class Decision(Protocol):
    """One kind of what workers load."""

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to decide: else the queue is asked nothing for it."""
        ...

    async def decide(self, queue: QueueState) -> None:
        """Decide, and change the registry."""
        ...


async def run_round(decisions: Iterable[Decision], queue: QueuePort, timeout_ms: int) -> None:
    """Let each of ``decisions`` that is needed be made, in order. Raises broker errors."""
    needed = [decision for decision in decisions if decision.is_needed]
    if not needed:
        return
    away: set[int] = set()
    depths = await call_queue(timeout_ms, queue.stats.depths(away))
    state = QueueState(depths, frozenset(away), queue.shard_of)
    for decision in needed:
        await decision.decide(state)
