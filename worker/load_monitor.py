"""Follow the engine's load: keep a session's slots at what it takes, and number its prefix cache as that forgets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from scheduling.cache_age import CacheAge, next_age
from scheduling.slots import EngineLoad, SlotBounds, asks_now, first_state, next_state
from telemetry import get_logger

from .core import Slots
from .engines import Engine

log = get_logger(__name__)


class LoadMonitor:
    """Changes ``slots.total`` within ``bounds`` by the load of ``engine``, read every ``interval_s``, and calls
    ``limit_changed`` when it did. Raises ``slots.cache``, says ``slots.maximum`` while the engine tells its load, and
    calls ``cache_changed`` when one of these did. With an interval of 0 it never asks."""

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        bounds: SlotBounds,
        interval_s: float,
        *,
        limit_changed: Callable[[], None],
        cache_changed: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._bounds = bounds
        self._interval_s = interval_s
        self._limit_changed = limit_changed
        self._cache_changed = cache_changed
        self._state = first_state(bounds)
        self._age = CacheAge()
        self.load: EngineLoad | None = None
        """The last reading; None if the engine tells none now."""

    async def run(self) -> NoReturn:
        """Adapt until cancelled. Never raises for anything an engine says."""
        if not self._interval_s:
            await asyncio.Event().wait()
        passed = 0
        while True:
            await asyncio.sleep(self._interval_s)
            passed += 1
            if not self._slots.ready:  # what comes is another engine, which knows nothing of this one's load
                self.load, self._age, self._state, self._slots.maximum = None, CacheAge(), first_state(self._bounds), 0
                self._set_limit()
            elif asks_now(self._state, self._bounds, busy=self._slots.busy, passed=passed):
                passed = 0
                await self._adapt()

    async def _adapt(self) -> None:
        slots = self._slots
        self.load = await self._engine.load()
        self._age, rises = next_age(self._age, self.load)
        before = slots.capacity
        slots.cache += rises
        if self.load is not None:
            slots.maximum = self._bounds.maximum
        self._state = next_state(self._state, self._bounds, self.load, busy=slots.busy, all_in_use=slots.all_in_use)
        self._set_limit()
        if rises or slots.capacity != before:
            self._cache_changed()

    def _set_limit(self) -> None:
        slots, limit = self._slots, self._state.limit
        if limit != slots.total:
            log.debug("slots_changed", before=slots.total, slots=limit, engine=_told(self.load))
            slots.total = limit
            self._limit_changed()


def _told(load: EngineLoad | None) -> str:
    if load is None:
        return "tells no load"
    kv_usage = "unknown" if load.kv_usage is None else f"{load.kv_usage:.2f}"
    return f"waiting {load.waiting}, running {load.running}, KV usage {kv_usage}, preemptions {load.preemptions}"
