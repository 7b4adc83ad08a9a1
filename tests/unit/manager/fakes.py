"""The Manager's context in memory: a queue, and what probes of workers find, both to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from broker import Expired, JobCounts, Reclaimed, RememberedPools
from manager import ManagerSettings
from manager.core import ProbeResult, ProbeStatus
from queue_schemas import (
    BrokerUnavailable,
    Control,
    ControlKind,
    Lane,
    LaneDepth,
    Pool,
    SessionId,
    WorkerId,
    WorkerInfo,
    shard_of_pool,
)
from queue_schemas.fleet.acting_manager import ActingManager


@dataclass
class FakeQueue:
    """``broker.Broker`` as the Manager sees it, and each part of it. ``answers_pings``: who renews when pinged.
    ``down``: Redis is away; ``refuses_reclaims``: only for reclaims."""

    shards: int = 2
    round_trips: int = 0
    down: bool = False
    refuses_reclaims: bool = False
    reclaims_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared by a test, a reclaim has its effect and its answer is not there yet."""
    numbers: dict[SessionId, int] = field(default_factory=dict)
    answers_pings: set[str] = field(default_factory=set)
    controls: list[tuple[SessionId, Control]] = field(default_factory=list)
    reclaimed: list[SessionId] = field(default_factory=list)
    workers: dict[str, WorkerInfo] = field(default_factory=dict)
    adapter_sets: dict[str, frozenset[str]] = field(default_factory=dict)
    pools: dict[Pool, bool] = field(default_factory=dict)
    autoscalers: dict[str, str] = field(default_factory=dict)
    waiting: dict[Pool, dict[Lane, LaneDepth]] = field(default_factory=dict)
    counts: JobCounts = field(default_factory=JobCounts)
    holder: str = ""
    address: tuple[str, str] = ("", "")
    term: int = 0
    sweeps: int = 0
    faults: list[str] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    """Shards that do not answer."""
    reclaimed_on: list[tuple[int, SessionId]] = field(default_factory=list)
    swept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = self.known_pools = self.maintenance = self.stats = self
        self.reclaims_go_on.set()

    def open(self) -> AbstractAsyncContextManager[FakeQueue]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[FakeQueue]:
            self._trip()
            yield self

        return opened()

    def _trip(self) -> None:
        self.round_trips += 1
        if self.down:
            raise BrokerUnavailable("Redis is away")

    def shard_of(self, pool: str) -> int:
        return shard_of_pool(pool, self.shards)

    def _trip_on(self, shard: int) -> None:
        self._trip()
        if shard in self.away:
            raise BrokerUnavailable(f"shard {shard} is away")

    async def renewal_counters(self, shard: int) -> dict[SessionId, int]:
        self._trip_on(shard)
        return dict(self.numbers)

    async def send_control(self, session_id: SessionId, control: Control, shard: int = 0) -> bool:
        self._trip_on(shard)
        self.controls.append((session_id, control))
        if control.kind is ControlKind.PING and session_id in self.answers_pings:
            self.numbers[session_id] += 1
        return session_id in self.numbers

    async def reclaim(self, session_id: SessionId, shard: int) -> Reclaimed:
        self._trip_on(shard)
        if self.refuses_reclaims:
            raise BrokerUnavailable("Redis is away")
        self.numbers.pop(session_id, None)
        self.reclaimed_on.append((shard, session_id))
        if session_id in self.reclaimed:
            return Reclaimed()
        self.reclaimed.append(session_id)
        await self.reclaims_go_on.wait()
        return Reclaimed(requeued=2)

    async def expire(self, shard: int) -> Expired:
        self._trip_on(shard)
        self.swept.append(shard)
        self.sweeps = self.swept.count(shard)
        return Expired()

    async def server_faults(self) -> list[str]:
        return list(self.faults)

    async def acquire_leader_lease(self, manager_id: str, ttl_ms: int, url: str = "", proof: str = "") -> int | None:
        self._trip()
        if self.holder not in ("", manager_id):
            return None
        if not self.holder:
            self.holder, self.term = manager_id, self.term + 1
        self.address = (url, proof)
        return self.term

    async def acting_manager(self) -> ActingManager:
        self._trip()
        return ActingManager(self.holder, 1 if self.holder else 0, *self.address)

    async def release_leader_lease(self, manager_id: str) -> None:
        self._trip()
        if self.holder == manager_id:
            self.holder = ""

    async def load_workers(self) -> dict[str, WorkerInfo]:
        self._trip()
        return dict(self.workers)

    async def save_workers(self, changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None:
        self._trip()
        self.workers |= {info.worker_id: info for info in changed}
        for worker_id in gone:
            self.workers.pop(worker_id, None)

    async def load_adapter_sets(self) -> dict[str, frozenset[str]]:
        self._trip()
        return dict(self.adapter_sets)

    async def save_adapter_sets(self, new: Mapping[str, Iterable[str]], gone: Iterable[str]) -> None:
        self._trip()
        self.adapter_sets |= {name: frozenset(adapters) for name, adapters in new.items()}
        for name in gone:
            self.adapter_sets.pop(name, None)

    async def remember(self, models: Iterable[str], *, declared: bool = False) -> None:
        self._trip()
        for model in map(Pool, models):
            self.pools[model] = declared or self.pools.get(model, False)

    async def claim(self, pool: str, autoscaler_id: str, ttl_ms: int) -> bool:
        self._trip()
        holder = self.autoscalers.setdefault(pool, autoscaler_id) if ttl_ms else self.autoscalers.pop(pool, "")
        self.pools[Pool(pool)] = True
        return bool(ttl_ms) and holder == autoscaler_id

    async def remembered(self) -> RememberedPools:
        self._trip()
        return RememberedPools(dict(self.pools))

    async def depths(self, away: set[int] | None = None) -> dict[Pool, dict[Lane, LaneDepth]]:
        self._trip()
        return dict(self.waiting)

    async def job_counts(self, away: set[int] | None = None) -> JobCounts:
        self._trip()
        return self.counts


@dataclass
class FakeProbe:
    """Results by URL; a URL not named does not answer. ``while_probing`` is called during each probe."""

    results: dict[str, ProbeResult] = field(default_factory=dict)
    probes: int = 0
    while_probing: Callable[[], None] | None = None

    async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
        self.probes += 1
        if self.while_probing is not None:
            self.while_probing()
        return self.results.get(url, ProbeResult(ProbeStatus.UNKNOWN, "no answer"))


def fast_settings(**fields: object) -> ManagerSettings:
    """Everything some thirty times as fast as it is by default."""
    fast = {
        "lease_ms": 600, "heartbeat_interval_ms": 60, "unresponsive_after_ms": 200, "leader_lease_ms": 300,
        "sweep_interval_ms": 20, "ping_timeout_ms": 100, "probe_timeout_ms": 200, "broker_timeout_ms": 1000,
    }  # fmt: skip
    return ManagerSettings.load(**(fast | fields))
