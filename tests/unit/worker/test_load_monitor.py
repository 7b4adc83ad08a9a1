"""How often a worker reads its engine's load."""

from __future__ import annotations

import asyncio
import contextlib
from typing import cast

from scheduling.slots import IDLE_READINGS, EngineLoad, SlotBounds
from tests.support.waiting import eventually
from worker.core import Slots
from worker.engines import Engine
from worker.load_monitor import LoadMonitor


class Answering:
    """An engine that says each of ``loads``, and the last for ever."""

    def __init__(self, *loads: EngineLoad) -> None:
        self.loads = list(loads)
        self.asked = 0

    async def load(self) -> EngineLoad:
        self.asked += 1
        return self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]


async def test_the_cache_is_numbered_by_what_the_engine_stores() -> None:
    """Half of what it holds, then all of it."""
    engine = Answering(*(EngineLoad(0, 0, 0.0, 0, new, 0, 0, 1_000) for new in (0, 500, 1_000, 1_000)))
    slots = Slots(16, busy=4)
    monitor = LoadMonitor(cast(Engine, engine), slots, SlotBounds(16, 16), 0.01, lambda: None)
    running = asyncio.create_task(monitor.run())
    try:
        await eventually(lambda: engine.asked == 2, "it is asked twice")
        assert slots.cache == 0
        await eventually(lambda: engine.asked > 3, "and more")
        assert slots.cache == 1
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_an_idle_worker_with_few_slots_gets_them_back_at_once() -> None:
    """It reads its engine at each interval until its slots are those of the setting, and then a tenth as often."""
    engine = Answering(EngineLoad(3, 1), EngineLoad(3, 1), EngineLoad(0, 0))
    slots = Slots(16, busy=4)
    monitor = LoadMonitor(cast(Engine, engine), slots, SlotBounds(16, 16), 0.01, lambda: None)
    running = asyncio.create_task(monitor.run())
    try:
        await eventually(lambda: slots.total == 1, "what waits lowers the slots")
        slots.busy = 0
        asked = engine.asked
        await eventually(lambda: slots.total == 16, "they are back")
        assert engine.asked - asked < 2 * IDLE_READINGS
        asked = engine.asked
        await asyncio.sleep(0.01 * IDLE_READINGS)
        assert engine.asked - asked <= 2
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
