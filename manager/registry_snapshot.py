"""Write the registry and the pools it serves into Redis, for Routers, workers and the next acting Manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

from queue_schemas import Pool, WorkerInfo

from .core import Registry
from .ports import Clock, QueuePort, call_queue
from .settings import ManagerSettings

SNAPSHOT_CHECK_S = 10.0
"""How often the snapshot is read again: a Redis that lost its latest writes, or a late write of the Manager before, may
have made it wrong."""
POOLS_REFRESH_S = 600.0
"""How often a served pool is remembered again; the memory lasts a day."""


class RegistrySnapshot:
    """Writes what changed in ``registry``. ``changed`` is set when there is something to write."""

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        registry: Registry,
        changed: asyncio.Event,
        clock: Clock = time.monotonic,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._registry = registry
        self._changed = changed
        self._clock = clock
        self._saved: dict[str, WorkerInfo] = {}
        self._saved_sets: set[str] = set()
        """Sets of adapters that are in Redis."""
        self._dirty: set[str] = set()
        """Workers whose entries may differ from those in Redis."""
        self._check_at = clock() + SNAPSHOT_CHECK_S
        self._pools_due: dict[str, float] = {}
        self._pools_at = clock()

    async def load(self) -> tuple[Iterable[WorkerInfo], Mapping[str, frozenset[str]]]:
        """What the last Manager wrote down: the workers, and sets of adapters by name."""
        snapshot, sets = await self._read()
        self._dirty |= snapshot.keys()
        self._changed.set()
        return snapshot.values(), sets

    async def _read(self) -> tuple[Mapping[str, WorkerInfo], Mapping[str, frozenset[str]]]:
        limit, fleet = self._settings.broker_timeout_ms, self._queue.fleet
        self._saved = await call_queue(limit, fleet.load_workers())
        sets = await call_queue(limit, fleet.load_adapter_sets())
        self._saved_sets = set(sets)
        return dict(self._saved), sets

    def save_soon(self, worker_id: str) -> None:
        """The entry has changed in a way that others act on."""
        self._dirty.add(worker_id)
        self._changed.set()

    def save_later(self, worker_id: str) -> None:
        """The entry has changed in a way that can wait for the next sweep."""
        self._dirty.add(worker_id)

    def save_if_due(self) -> None:
        """Called by each sweep: have written what waits for it."""
        if self._dirty or self._clock() >= min(self._check_at, self._pools_at):
            self._changed.set()

    async def save(self) -> None:
        """Write the entries that changed since the last time, and remember the pools that are served."""
        registry, now = self._registry, self._clock()
        if now >= self._check_at:
            await self._read()
            self._check_at = self._clock() + SNAPSHOT_CHECK_S
            self._dirty |= self._saved.keys() | {member.worker_id for member in registry.members()}
            await self._write_adapter_sets(are_checked=True)
        dirty, self._dirty = self._dirty, set()
        try:
            await self._write(dirty)
        except BaseException:
            self._dirty |= dirty
            raise
        if self._clock() >= self._pools_at or dirty:
            await self._remember_pools({model for member in registry.members() for model in member.status.models})

    async def _write(self, worker_ids: set[str]) -> None:
        found = {worker_id: self._registry.find(worker_id) for worker_id in worker_ids}
        now = {worker_id: member.info() for worker_id, member in found.items() if member is not None}
        changed = [info for worker_id, info in now.items() if self._saved.get(worker_id) != info]
        gone = [worker_id for worker_id in worker_ids if worker_id in self._saved and worker_id not in now]
        if any(info.adapter_set and info.adapter_set not in self._saved_sets for info in changed):
            await self._write_adapter_sets()
        if changed or gone:
            await call_queue(self._settings.broker_timeout_ms, self._queue.fleet.save_workers(changed, gone))
        self._saved |= now
        for worker_id in gone:
            del self._saved[worker_id]

    async def _write_adapter_sets(self, *, are_checked: bool = False) -> None:
        """Write those that are not there; if Redis was read a moment ago (``are_checked``), remove those of nobody."""
        sets = self._registry.adapter_sets()
        new = {name: adapters for name, adapters in sets.items() if name not in self._saved_sets}
        known = {info.adapter_set for info in self._saved.values()}
        gone = sorted(self._saved_sets - sets.keys() - known) if are_checked else []
        if new or gone:
            await call_queue(self._settings.broker_timeout_ms, self._queue.fleet.save_adapter_sets(new, gone))
        self._saved_sets = (self._saved_sets | new.keys()) - set(gone)

    async def _remember_pools(self, served: set[str]) -> None:
        now, limit = self._clock(), self._settings.broker_timeout_ms
        declared = {*self._settings.pools, *self._settings.placement}
        due = {model for model in served | declared if now >= self._pools_due.get(model, now)}
        self._pools_at = min((at for at in self._pools_due.values() if at > now), default=now + POOLS_REFRESH_S)
        if not due:
            return
        self._pools_at = now  # until that is done
        if due & declared:
            await call_queue(limit, self._queue.known_pools.remember(sorted(due & declared), declared=True))
        known = (await call_queue(limit, self._queue.known_pools.remembered())).known
        # Remembering a pool that another process declared would end its declaration.
        seen = sorted(model for model in due - declared if not known.get(Pool(model), False))
        if seen:
            await call_queue(limit, self._queue.known_pools.remember(seen))
        still_due = {model: due_at for model, due_at in self._pools_due.items() if model in served | declared}
        self._pools_due = still_due | dict.fromkeys(due, now + POOLS_REFRESH_S)
        self._pools_at = min(self._pools_due.values())
