"""LoRA adapters that are loaded and unloaded while the simulated engine serves, in this process and over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from queue_schemas import EngineFailed, EngineState
from telemetry.environment import free_port
from tests.support.adapters import make_adapter
from tests.support.processes import Child, environment
from tests.support.waiting import eventually
from worker.engines import Engine, EngineCall
from worker.engines.adapter_calls import AdapterRefused, AdaptersUnsupported
from worker.engines.dialects.vllm import LOAD_PATH, UNLOAD_PATH
from worker.engines.http import HttpEngine
from worker.engines.simulated import SimulatedEngine, SimulationSettings
from worker.engines.simulated.options import build_parser, read_options

OPTIONS = ("--model", "base", "--adapter", "fixed", "--max-adapters", "3", "--instant")
ROOT = Path(__file__).parents[5]


@asynccontextmanager
async def running(kind: str, folder: Path, *options: str) -> AsyncIterator[Engine]:
    """A READY engine: ``here``, in this process, or ``http``, in its own."""
    arguments = [*OPTIONS, *options]
    engine: SimulatedEngine | HttpEngine
    child = None
    if kind == "here":
        engine = SimulatedEngine(read_options(arguments)[2])
    else:
        port = str(free_port())
        command = [sys.executable, "-m", "worker.engines.simulated", "--port", port, *arguments]
        child = Child("engine", command, folder / "engine.log", env=environment(), cwd=ROOT)
        child.start()
        engine = HttpEngine(f"http://127.0.0.1:{port}")
    watching = asyncio.create_task(engine.run(lambda: None))
    try:
        await eventually(lambda: engine.state is EngineState.READY, "the engine is ready", limit_s=20)
        yield engine
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await engine.stop(1.0)
        if child is not None:
            child.kill_group()


async def status_of(engine: Engine, model: str) -> int:
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    async with engine.call(EngineCall("/v1/chat/completions", json.dumps(body).encode())) as answer:
        await answer.read(1 << 20)
        return answer.status


@pytest.mark.parametrize("kind", ["here", "http"])
async def test_adapters_come_and_go_while_it_serves(kind: str, tmp_path: Path) -> None:
    """A loaded one is listed with its base and answers; one that was unloaded is unknown, also to a body that was
    answered before. What is so already is no error."""
    path = str(make_adapter(tmp_path, "tuned"))
    async with running(kind, tmp_path) as engine:
        assert await status_of(engine, "tuned") == 404
        for _ in range(2):
            await engine.load_adapter("tuned", path)
            assert engine.models == ("base", "fixed", "tuned")
        assert engine.cards["tuned"]["parent"] == "base"
        assert await status_of(engine, "tuned") == 200
        for _ in range(2):
            await engine.unload_adapter("tuned")
            assert engine.models == ("base", "fixed")
        assert await status_of(engine, "tuned") == 404


@pytest.mark.parametrize("kind", ["here", "http"])
async def test_what_cannot_be_loaded_is_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    """A folder that is no adapter, one too many, a failure that was ordered; the engine serves on."""
    async with running(kind, tmp_path) as engine:
        with pytest.raises(AdapterRefused, match=r"404 .*No adapter found for /nowhere"):
            await engine.load_adapter("missing", "/nowhere")
        failing = make_adapter(tmp_path, "failing", {"fail": 507, "times": 1})
        with pytest.raises(AdapterRefused, match=r"507 .*ordered"):
            await engine.load_adapter("failing", str(failing))
        await engine.load_adapter("failing", str(failing))
        await engine.load_adapter("another", str(make_adapter(tmp_path, "another")))
        with pytest.raises(AdapterRefused, match=r"400 .*no room"):
            await engine.load_adapter("one too many", str(make_adapter(tmp_path, "more")))
        assert engine.models == ("base", "fixed", "failing", "another")


@pytest.mark.parametrize("kind", ["here", "http"])
@pytest.mark.parametrize("fail", ["close_midstream", "garbage", "never_ready"])
async def test_loads_fail_in_every_way(kind: str, fail: str, tmp_path: Path) -> None:
    """As any request may."""
    adapter = make_adapter(tmp_path, "failing", {"fail": fail})
    async with running(kind, tmp_path) as engine:
        with pytest.raises(EngineFailed):
            await engine.load_adapter("failing", str(adapter))
        assert "failing" not in engine.models


@pytest.mark.parametrize("kind", ["here", "http"])
async def test_an_engine_without_these_calls_is_told_from_one_that_lacks_the_adapter(kind: str, tmp_path: Path) -> None:
    """Both answer 404."""
    async with running(kind, tmp_path, "--no-adapter-updates") as engine:
        with pytest.raises(AdaptersUnsupported, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            await engine.load_adapter("tuned", str(make_adapter(tmp_path, "tuned")))


async def test_an_engine_that_crashes_while_it_loads_starts_without_adapters(tmp_path: Path) -> None:
    """They are loaded again by whoever wants them."""
    async with running("here", tmp_path) as engine:
        await engine.load_adapter("tuned", str(make_adapter(tmp_path, "tuned")))
        with pytest.raises(EngineFailed):
            await engine.load_adapter("deadly", str(make_adapter(tmp_path, "deadly", {"fail": "crash"})))
        assert engine.state is EngineState.FAILED
        await eventually(lambda: engine.models == ("base", "fixed"), "it is back without it")


async def test_a_load_takes_its_time(tmp_path: Path) -> None:
    """Until then the adapter is unknown, and others are served."""
    async with running("here", tmp_path, "--adapter-load-ms", "60000") as engine:
        loading = asyncio.create_task(engine.load_adapter("tuned", str(make_adapter(tmp_path, "tuned"))))
        await asyncio.sleep(0)
        assert await status_of(engine, "tuned") == 404
        assert await status_of(engine, "fixed") == 200
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (LOAD_PATH, {"lora_name": "x"}, "must be provided"),
        (LOAD_PATH, {"lora_name": 1, "lora_path": "/x"}, "valid string"),
        (LOAD_PATH, {"lora_name": "fixed", "lora_path": "/x"}, "already been loaded"),
        (LOAD_PATH, {"lora_name": "x", "lora_path": "/\0"}, "No adapter found"),
        (UNLOAD_PATH, {}, "needs to be provided"),
        (UNLOAD_PATH, {"lora_name": "x"}, "cannot be found"),
    ],
)
async def test_wrong_calls_are_answered_in_vllms_words(path: str, body: dict[str, object], reason: str) -> None:
    """400, or 404 for what is not there."""
    engine = SimulatedEngine(SimulationSettings(adapters=("fixed",)))
    engine.state = EngineState.READY
    status, answer = await engine.exchange("POST", path, json.dumps(body).encode())
    assert status == (404 if "found" in reason else 400)
    assert reason in json.loads(answer)["error"]["message"]


def test_its_options_are_checked() -> None:
    """No room for any, and a load that takes less than no time."""
    assert build_parser().parse_args([]).max_adapters == SimulationSettings().max_adapters
    for wrong in ({"max_adapters": 0}, {"adapter_load_ms": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SimulationSettings(**wrong)  # type: ignore[arg-type]
