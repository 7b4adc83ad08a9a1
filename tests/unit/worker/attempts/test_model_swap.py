"""A worker follows the model of its assignment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from telemetry import MetricsRegistry
from tests.support.waiting import eventually
from worker.attempts import Attempts
from worker.attempts.model_swap import ModelSwap
from worker.context import WorkerContext
from worker.metrics import WorkerMetrics


@dataclass
class Engine:
    """Switches at once. ``switches``: what it was told to load."""

    loadable: tuple[str, ...] = ("a", "b", "c")
    loaded: str = "a"
    switches: list[str] = field(default_factory=list)

    def switch(self, model: str) -> None:
        self.loaded = model
        self.switches.append(model)


@dataclass
class Running:
    """Attempts that end when ``done`` is set. ``limits``: how long each wait for them may take, in seconds."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    limits: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return int(not self.done.is_set())

    async def finish(self, timeout_s: float, hurry: asyncio.Event) -> None:
        self.limits.append(timeout_s)
        await self.done.wait()


@asynccontextmanager
async def swapping() -> AsyncIterator[tuple[ModelSwap, Engine, Running, asyncio.Event]]:
    engine, running, drain = Engine(), Running(), asyncio.Event()
    context = SimpleNamespace(
        switching=engine,
        settings=SimpleNamespace(drain_timeout_ms=700),
        metrics=WorkerMetrics(MetricsRegistry("worker")),
        drain=drain,
        hurry=asyncio.Event(),
    )
    swap = ModelSwap(cast(WorkerContext, context))
    task = asyncio.create_task(swap.run(cast(Attempts, running)))
    try:
        yield swap, engine, running, drain
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_engine_is_restarted_once_nothing_runs() -> None:
    """What runs may take as long as a drain may."""
    async with swapping() as (swap, engine, running, _):
        swap.want("b")
        await eventually(lambda: running.limits == [0.7], "it waits for what runs")
        assert engine.switches == []
        running.done.set()
        await eventually(lambda: engine.switches == ["b"], "the engine is switched")
        swap.want("a")
        await eventually(lambda: engine.switches == ["b", "a"], "it is switched back")


async def test_what_is_wanted_last_counts() -> None:
    """A wish that is taken back before the engine was ended changes nothing; another one replaces it."""
    async with swapping() as (swap, engine, running, _):
        swap.want("b")
        await eventually(lambda: len(running.limits) == 1, "it waits for what runs")
        swap.want("")
        await asyncio.sleep(0)
        swap.want("c")
        await eventually(lambda: len(running.limits) == 2, "it waits anew")
        running.done.set()
        await eventually(lambda: engine.switches == ["c"], "the engine is switched")
    async with swapping() as (swap, engine, running, _):
        swap.want("b")
        await eventually(lambda: len(running.limits) == 1, "it waits for what runs")
        swap.want("a")
        running.done.set()
        for _ in range(9):
            await asyncio.sleep(0)
        assert engine.switches == []


async def test_nothing_is_loaded_without_need() -> None:
    """Not the model that is there, none that is not installed, and none in a worker that ends."""
    async with swapping() as (swap, engine, running, drain):
        running.done.set()
        for model in ("a", "", "unheard of"):
            swap.want(model)
            for _ in range(9):
                await asyncio.sleep(0)
        assert running.limits == []
        drain.set()
        swap.want("b")
        await eventually(lambda: len(running.limits) == 1, "it would load it")
        await asyncio.sleep(0)
        assert engine.switches == []
