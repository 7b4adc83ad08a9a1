"""What the Manager needs from outside: the queue, probes of workers, a clock; and the limit on calls to the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from broker import Expired, JobCounts, Reclaimed, RememberedPools
from queue_schemas import BrokerUnavailable, Control, Lane, LaneDepth, Pool, SessionId, WorkerId, WorkerInfo
from queue_schemas.fleet.acting_manager import ActingManager

from .core import ProbeResult

Clock = Callable[[], float]
"""Monotonic seconds."""
_T = TypeVar("_T")


class FleetPort(Protocol):
    """:class:`broker.operations.fleet.Fleet`. Durations in milliseconds."""

    async def acquire_leader_lease(
        self, manager_id: str, ttl_ms: int, url: str = "", proof: str = ""
    ) -> int | None: ...

    async def release_leader_lease(self, manager_id: str) -> None: ...

    async def acting_manager(self) -> ActingManager: ...

    async def load_workers(self) -> dict[str, WorkerInfo]: ...

    async def save_workers(self, changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None: ...

    async def load_adapter_sets(self) -> dict[str, frozenset[str]]: ...

    async def save_adapter_sets(self, new: Mapping[str, Iterable[str]], gone: Iterable[str]) -> None: ...

    async def send_control(self, session_id: SessionId, control: Control, shard: int = 0) -> bool: ...


class KnownPoolsPort(Protocol):
    """:class:`broker.operations.known_pools.KnownPools`. Durations in milliseconds."""

    async def remember(self, models: Iterable[str], *, declared: bool = False) -> None: ...

    async def remembered(self) -> RememberedPools: ...

    async def claim(self, pool: str, autoscaler_id: str, ttl_ms: int) -> bool: ...


class MaintenancePort(Protocol):
    """:class:`broker.operations.maintenance.Maintenance`."""

    async def renewal_counters(self, shard: int) -> dict[SessionId, int]: ...

    async def reclaim(self, session_id: SessionId, shard: int) -> Reclaimed: ...

    async def expire(self, shard: int) -> Expired: ...


class StatsPort(Protocol):
    """:class:`broker.operations.stats.QueueStats`."""

    async def depths(self, away: set[int] | None = None) -> dict[Pool, dict[Lane, LaneDepth]]: ...

    async def job_counts(self, away: set[int] | None = None) -> JobCounts: ...


class QueuePort(Protocol):
    """The Manager's side of :class:`broker.Broker`; errors as there."""

    @property
    def fleet(self) -> FleetPort: ...

    @property
    def known_pools(self) -> KnownPoolsPort: ...

    @property
    def maintenance(self) -> MaintenancePort: ...

    @property
    def stats(self) -> StatsPort: ...

    @property
    def shards(self) -> int: ...

    @property
    def round_trips(self) -> int: ...

    def shard_of(self, pool: str) -> int: ...

    async def server_faults(self) -> list[str]: ...


class WorkerProbe(Protocol):
    """Asks a worker's health page. It never raises and bounds its own time."""

    async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
        """Who answers at ``url``, asked as the worker ``worker_id`` in that ``session_id``."""
        ...


async def call_queue(timeout_ms: int, call: Awaitable[_T]) -> _T:
    """The answer of a broker call; ``BrokerUnavailable`` if it takes longer than ``timeout_ms``."""
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            return await call
    except TimeoutError as error:
        raise BrokerUnavailable(f"the queue's Redis did not answer within {timeout_ms} ms", retry_after_s=2) from error
