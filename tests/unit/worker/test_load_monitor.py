"""How often a worker reads its engine's load."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from scheduling.cache_age import GENERATIONS
from scheduling.slots import IDLE_READINGS, EngineLoad, SlotBounds
from tests.support.waiting import eventually
from worker.core import Slots
from worker.engines import Engine
from worker.load_monitor import LoadMonitor

IGNORED: dict[str, Any] = {"limit_changed": lambda: None, "cache_changed": lambda: None}


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
    slots = Slots(16, busy=4, ready=True)
    monitor = LoadMonitor(cast(Engine, engine), slots, SlotBounds(16, 16), 0.01, **IGNORED)
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
    slots = Slots(16, busy=4, ready=True)
    monitor = LoadMonitor(cast(Engine, engine), slots, SlotBounds(16, 16), 0.01, **IGNORED)
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


async def test_another_engine_begins_anew() -> None:
    """With the slots of the setting, no overload remembered, and a cache whose number its stop has raised."""
    loads = [EngineLoad(3, 1), EngineLoad(3, 1), EngineLoad(0, 1, 0.1, 0, 500, 0, 0, 1_000)]
    engine, told = Answering(*loads), []
    slots = Slots(16, busy=4, ready=True)
    monitor = LoadMonitor(
        cast(Engine, engine), slots, SlotBounds(16, 64), 0.01,
        limit_changed=lambda: told.append("limit"), cache_changed=lambda: told.append("cache"),
    )  # fmt: skip
    running = asyncio.create_task(monitor.run())
    try:
        await eventually(lambda: slots.total == 1, "what waits lowers the slots")
        assert (slots.capacity, told) == (64, ["cache", "limit"])
        slots.engine_is(ready=False)
        await eventually(lambda: slots.total == 16, "they are back")
        assert (slots.capacity, monitor.load) == (16, None)
        engine.loads = [EngineLoad(0, 1, 0.1, 0, 0, 0, 0, 1_000)]
        slots.engine_is(ready=True)
        await eventually(lambda: slots.capacity == 64, "the engine tells its load again")
        assert slots.cache == GENERATIONS
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
