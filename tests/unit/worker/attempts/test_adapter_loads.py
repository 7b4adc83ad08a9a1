"""A worker follows the adapters of its assignment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from queue_schemas import EngineFailed, EngineState
from telemetry import MetricsRegistry
from tests.support.adapters import make_adapters
from tests.support.waiting import eventually
from worker.attempts import Attempts
from worker.attempts import adapter_loads as loads_module
from worker.attempts.adapter_loads import AdapterLoads
from worker.context import WorkerContext
from worker.engines.adapter_calls import AdapterRefused, AdaptersUnsupported
from worker.engines.adapter_folder import AdapterFolder
from worker.metrics import WorkerMetrics


@dataclass
class Engine:
    """Lists ``models``; ``calls`` are what it was asked. ``fails``: what loads of an adapter, or ``unload``, raise."""

    models: tuple[str, ...] = ("base", "fixed")
    state: EngineState = EngineState.READY
    calls: list[str] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)
    may_unload: asyncio.Event = field(default_factory=asyncio.Event)

    async def load_adapter(self, name: str, path: str) -> None:
        self.calls.append(f"load {name}")
        assert path.endswith(f"/{name}")
        if name in self.fails:
            raise self.fails[name]
        self.models = (*self.models, name)

    async def unload_adapter(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        await self.may_unload.wait()
        if "unload" in self.fails:
            raise self.fails.pop("unload")
        self.models = tuple(model for model in self.models if model != name)


@dataclass
class Running:
    """Attempts of one model that end when ``done`` is set. ``waits``: the models that were waited for, for how long."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    waits: list[tuple[str, float]] = field(default_factory=list)

    async def finish_model(self, model: str, timeout_s: float, hurry: asyncio.Event) -> None:
        self.waits.append((model, timeout_s))
        await self.done.wait()


class Scene:
    def __init__(self, folder: AdapterFolder) -> None:
        self.engine, self.running = Engine(), Running()
        self.running.done.set()
        self.engine.may_unload.set()
        self.changed = 0
        context = SimpleNamespace(
            engine=self.engine,
            settings=SimpleNamespace(drain_timeout_ms=700),
            metrics=WorkerMetrics(MetricsRegistry("worker")),
            hurry=asyncio.Event(),
        )
        self.loads = AdapterLoads(cast(WorkerContext, context), folder, self._note_change)

    def _note_change(self) -> None:
        self.changed += 1

    async def until(self, *models: str) -> None:
        wanted = ("base", "fixed", *models)
        await eventually(lambda: sorted(self.engine.models) == sorted(wanted), f"the engine has {models}")


@asynccontextmanager
async def following(tmp_path: Path, room: int = 2) -> AsyncIterator[Scene]:
    scene = Scene(AdapterFolder(make_adapters(tmp_path, ["x", "y", "z"]), room))
    task = asyncio.create_task(scene.loads.run(cast(Attempts, scene.running)))
    try:
        yield scene
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_is_wanted_is_loaded_and_the_rest_unloaded(tmp_path: Path) -> None:
    """What the engine has by itself stays; whoever counts on it is told of each change."""
    async with following(tmp_path) as scene:
        scene.loads.want(["x", "y"])
        await scene.until("x", "y")
        await eventually(lambda: scene.changed == 2, "it is told")
        scene.loads.want(["y", "z"])
        await scene.until("y", "z")
        assert scene.engine.calls == ["load x", "load y", "unload x", "load z"]
        scene.loads.want([])
        await scene.until()


async def test_without_a_word_on_adapters_nothing_changes(tmp_path: Path) -> None:
    """As of a Manager of another version."""
    async with following(tmp_path) as scene:
        scene.loads.want(["x"])
        await scene.until("x")
        scene.loads.want(None)
        await settle()
        assert scene.engine.calls == ["load x"]


async def test_an_adapter_is_unloaded_once_none_of_its_jobs_runs(tmp_path: Path) -> None:
    """They may take as long as a drain may; what was wanted in its place waits for the room, and other loads do not."""
    async with following(tmp_path) as scene:
        scene.loads.want(["x"])
        await scene.until("x")
        scene.running.done.clear()
        scene.loads.want(["y", "z"])
        await scene.until("x", "y")
        await settle()
        assert scene.running.waits == [("x", 0.7)]
        assert not scene.loads.lacks("x")  # its jobs run on
        scene.running.done.set()
        await scene.until("y", "z")
        assert scene.running.waits == [("x", 0.7), ("x", 0)]
        assert scene.loads.lacks("x")


async def test_an_adapter_that_is_wanted_again_stays(tmp_path: Path) -> None:
    """If it was not unloaded yet; else it is loaded anew."""
    async with following(tmp_path) as scene:
        scene.loads.want(["x"])
        await scene.until("x")
        scene.running.done.clear()
        scene.loads.want([])
        await eventually(lambda: len(scene.running.waits) == 1, "it is about to be unloaded")
        scene.loads.want(["x"])
        await settle()
        scene.running.done.set()
        await settle()
        assert scene.engine.calls == ["load x"]
        scene.engine.may_unload.clear()
        scene.loads.want([])
        await eventually(lambda: "unload x" in scene.engine.calls, "it is being unloaded")
        scene.loads.want(["x"])
        await settle()
        assert scene.loads.lacks("x")
        scene.engine.may_unload.set()
        await eventually(lambda: scene.engine.calls == ["load x", "unload x", "load x"], "it is loaded anew")
        await eventually(lambda: not scene.loads.lacks("x"), "its jobs are taken")


async def test_jobs_of_an_adapter_that_is_not_there_go_back(tmp_path: Path) -> None:
    """Of one that is being unloaded, too, whatever the engine lists. Other models are not its business."""
    async with following(tmp_path) as scene:
        assert [scene.loads.lacks(model) for model in ("x", "base", "fixed", "unheard of")] == [True, *[False] * 3]
        scene.loads.want(["x"])
        await scene.until("x")
        await eventually(lambda: not scene.loads.lacks("x"), "it is there")
        scene.engine.may_unload.clear()
        scene.loads.want([])
        await eventually(lambda: "unload x" in scene.engine.calls, "it is being unloaded")
        assert "x" in scene.engine.models
        assert scene.loads.lacks("x")


async def test_an_engine_that_was_started_anew_is_given_its_adapters_again(tmp_path: Path) -> None:
    """Once it is ready."""
    async with following(tmp_path) as scene:
        scene.loads.want(["x"])
        await scene.until("x")
        scene.engine.state, scene.engine.models = EngineState.STARTING, ("base", "fixed")
        scene.loads.engine_changed()
        await settle()
        assert scene.engine.calls == ["load x"]
        scene.engine.state = EngineState.READY
        scene.loads.engine_changed()
        await scene.until("x")


@pytest.mark.parametrize("error", [AdapterRefused("rank 64"), EngineFailed("gone")])
async def test_a_load_that_fails_is_reported_and_not_repeated(tmp_path: Path, error: Exception) -> None:
    """Until another assignment wants it: who decides knows of it. Others are loaded."""
    async with following(tmp_path) as scene:
        scene.engine.fails["x"] = error
        scene.loads.want(["x", "y"])
        await scene.until("y")
        assert scene.loads.failures == {"x": str(error)}
        assert scene.loads.room == 2
        scene.loads.engine_changed()
        await settle()
        assert scene.engine.calls == ["load x", "load y"]
        del scene.engine.fails["x"]
        scene.loads.want(["x", "y"])
        await scene.until("x", "y")
        assert scene.loads.failures == {}


async def test_an_engine_that_cannot_load_any_has_no_room(tmp_path: Path) -> None:
    """Until it is another one."""
    async with following(tmp_path) as scene:
        scene.engine.fails["x"] = AdaptersUnsupported("no such call")
        scene.loads.want(["x", "y"])
        await eventually(lambda: scene.loads.failures == {"x": "no such call"}, "it is reported")
        await settle()
        assert scene.loads.room == 0
        assert scene.engine.calls == ["load x"]
        scene.engine.state = EngineState.FAILED
        scene.loads.engine_changed()
        assert scene.loads.room == 2


async def test_an_adapter_that_is_not_in_the_folder_is_reported(tmp_path: Path) -> None:
    """Its folder went away meanwhile."""
    async with following(tmp_path) as scene:
        scene.loads.want(["gone", "x"])
        await scene.until("x")
        assert scene.loads.failures == {"gone": "it is not in this worker's folder of adapters"}


async def test_an_unload_that_fails_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause, in which its jobs would run."""
    monkeypatch.setattr(loads_module, "_RETRY_S", 0.02)
    async with following(tmp_path) as scene:
        scene.loads.want(["x"])
        await scene.until("x")
        scene.engine.fails["unload"] = EngineFailed("busy")
        scene.loads.want([])
        await scene.until()
        assert scene.engine.calls == ["load x", "unload x", "unload x"]
