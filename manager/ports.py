"""Where the Manager meets the outside: the queue, and the workers' HTTP services."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from broker import Expired, JobCounts, Reclaimed
from queue_schemas import Control, Lane, LaneDepth, Pool, SessionId, WorkerId, WorkerInfo
from queue_schemas.fleet.acting_manager import ActingManager

from .core import Door


class QueuePort(Protocol):
    """The Manager's side of :class:`broker.Broker`; errors as there. Durations in milliseconds."""

    @property
    def shards(self) -> int: ...

    @property
    def round_trips(self) -> int: ...

    def shard_of(self, pool: str) -> int: ...

    async def beats_on(self, shard: int) -> dict[SessionId, int]: ...

    async def send_control(self, session_id: SessionId, control: Control, shard: int = 0) -> bool: ...

    async def reclaim_on(self, shard: int, session_id: SessionId) -> Reclaimed: ...

    async def expire_on(self, shard: int) -> Expired: ...

    async def act_as_manager(self, manager_id: str, ttl_ms: int, url: str = "", proof: str = "") -> int | None: ...

    async def acting_manager(self) -> ActingManager: ...

    async def resign_manager(self, manager_id: str) -> None: ...

    async def load_workers(self) -> dict[str, WorkerInfo]: ...

    async def save_workers(self, changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None: ...

    async def remember_pools(self, models: Iterable[str], *, declared: bool = False) -> None: ...

    async def known_pools(self) -> dict[Pool, bool]: ...

    async def server_faults(self) -> list[str]: ...

    async def depths(self, away: set[int] | None = None) -> dict[Pool, dict[Lane, LaneDepth]]: ...

    async def job_counts(self, away: set[int] | None = None) -> JobCounts: ...


class WorkerProbe(Protocol):
    """Looks at a worker's health page. It never raises and bounds its own time."""

    async def look(self, url: str, worker_id: WorkerId, session_id: SessionId) -> Door:
        """Who answers at ``url``, asked as the worker ``worker_id`` in that ``session_id``."""
        ...
