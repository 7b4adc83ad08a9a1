"""A pool, its registry and its driver in memory, with a clock that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from inferq.autoscale.autoscaler import Autoscaler
from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.metrics import AutoscaleMetrics
from inferq.autoscale.settings import AutoscaleSettings
from inferq.client import RequestFailed
from queue_schemas import (
    Assignment,
    EngineState,
    Lane,
    LaneDepth,
    PoolDepth,
    SessionId,
    WorkerInfo,
    WorkerState,
    new_session_id,
)
from queue_schemas.fleet.pools import pool_depth

POOL = "m"


class FakeFabric:
    """What a Manager and a Router say; ``down`` names what does not answer."""

    def __init__(self) -> None:
        self.registry: dict[str, WorkerInfo] = {}
        self.lanes: dict[Lane, LaneDepth] = {}
        self.of_adapters: dict[str, dict[Lane, LaneDepth]] = {}
        self.holders: dict[str, str] = {}
        """Who acts, by pool."""
        self.down: set[str] = set()
        self.drained: list[str] = []

    def join(
        self, worker_id: str, *, running: int = 0, engine: EngineState = EngineState.READY, slots: int = 4
    ) -> None:
        """A worker registers, or reports."""
        self.registry[worker_id] = WorkerInfo(
            worker_id=worker_id,
            session_id=new_session_id(worker_id),
            models=[POOL],
            slots=slots,
            running=running,
            engine=engine,
            assignment=Assignment(term=1, version=1),
        )

    def waits(self, waiting: int, leased: int = 0, lane: Lane = Lane.INTERACTIVE) -> None:
        """So many jobs are in ``lane`` now, and none in the others."""
        self.lanes = {lane: LaneDepth(waiting=waiting, leased=leased)}

    async def claim(self, pool: str, autoscaler_id: SessionId, ttl_ms: int) -> bool:
        self._answer("claim")
        if not ttl_ms:
            if self.holders.get(pool) == autoscaler_id:
                del self.holders[pool]
            return False
        return self.holders.setdefault(pool, autoscaler_id) == autoscaler_id

    async def pool(self, model: str) -> PoolDepth:
        self._answer("pool")
        serving = [worker for worker in self.registry.values() if worker.takes_work]
        lanes = self.lanes if model == POOL else self.of_adapters.get(model, {})
        return pool_depth(model, lanes, workers=len(serving), slots=sum(worker.slots for worker in serving))

    async def workers(self) -> list[WorkerInfo]:
        self._answer("workers")
        return list(self.registry.values())

    async def drain(self, worker_id: str) -> None:
        self._answer("drain")
        self.drained.append(worker_id)
        self.registry[worker_id] = self.registry[worker_id].model_copy(update={"state": WorkerState.DRAINING})

    def _answer(self, what: str) -> None:
        if what in self.down:
            raise RequestFailed(f"{what} is away")


class FakeDriver:
    """Starts workers that a test has join. ``fault`` is raised by every step, ``hangs`` lets every step hang."""

    def __init__(self, *, drains: bool = False) -> None:
        self.drains = drains
        self.outdated: frozenset[str] = frozenset()
        self.running: list[str] = []
        self.removed: list[str] = []
        self.asked: list[int] = []
        self.started = 0
        self.fault = ""
        self.hangs = False
        self.ignores_removals = False

    async def workers(self) -> frozenset[str]:
        await self._obey()
        return frozenset(self.running)

    async def scale_to(self, count: int) -> None:
        await self._obey()
        self.asked.append(count)
        while len(self.running) < count:
            self.started += 1
            self.running.append(f"w-{self.started}")

    async def remove(self, worker_ids: Sequence[str]) -> None:
        await self._obey()
        self.removed += worker_ids
        if not self.ignores_removals:
            self.running = [one for one in self.running if one not in worker_ids]

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        return ordered[:count]

    async def close(self) -> None:
        return None

    async def _obey(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fault:
            raise DriverFailed(self.fault)


class Scene:
    """One autoscaler. Without a driver or fabric it has its own."""

    def __init__(self, driver: FakeDriver | None = None, fabric: FakeFabric | None = None, **settings: object) -> None:
        self.driver = driver or FakeDriver()
        self.fabric = fabric or FakeFabric()
        self.metrics = AutoscaleMetrics()
        self.now_s = 1_000.0
        quick = {"pool": POOL, "max": 5, "worker_slots": 4, "scale_in_after": "10s", "start_timeout": "100s"}
        self.settings = AutoscaleSettings.load(**(quick | settings))
        self.autoscaler = Autoscaler(self.settings, self.fabric, self.driver, self.metrics, lambda: self.now_s)

    async def look(self, times: int = 1, every_s: float = 1.0) -> None:
        """Look so often, with a pause before each."""
        for _ in range(times):
            self.now_s += every_s
            await self.autoscaler.look()

    def all_join(self) -> None:
        """Every worker of the driver that is not registered yet does so."""
        for worker_id in self.driver.running:
            if worker_id not in self.fabric.registry:
                self.fabric.join(worker_id)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.collectors.get_sample_value(name, labels) or 0.0
