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
    """Changes ``slots.total`` within ``bounds`` and raises ``slots.cache`` by the load of ``engine``, read every
    ``interval_s``, and calls ``changed`` when it did. With an interval of 0 it never asks."""

    def __init__(
        self, engine: Engine, slots: Slots, bounds: SlotBounds, interval_s: float, changed: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._bounds = bounds
        self._interval_s = interval_s
        self._changed = changed
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
            if asks_now(self._state, self._bounds, busy=self._slots.busy, passed=passed):
                passed = 0
                await self._adapt()

    async def _adapt(self) -> None:
        slots = self._slots
        self.load = await self._engine.load()
        self._age, rises = next_age(self._age, self.load)
        slots.cache += rises
        self._state = next_state(self._state, self._bounds, self.load, busy=slots.busy, all_in_use=slots.all_in_use)
        if (limit := self._state.limit) != slots.total:
            log.debug("slots_changed", before=slots.total, slots=limit, engine=_told(self.load))
            slots.total = limit
        elif not rises:
            return
        self._changed()


def _told(load: EngineLoad | None) -> str:
    if load is None:
        return "tells no load"
    kv_usage = "unknown" if load.kv_usage is None else f"{load.kv_usage:.2f}"
    return f"waiting {load.waiting}, running {load.running}, KV usage {kv_usage}, preemptions {load.preemptions}"
