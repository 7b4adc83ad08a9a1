"""Engines as processes, with small scripts that behave as badly as real ones."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from queue_schemas import EngineFailed, EngineState
from telemetry.backoff import Backoff
from tests.support.processes import is_alive
from tests.support.waiting import eventually
from worker.engines import EngineCall, guard, process
from worker.engines.choice import make_engine
from worker.engines.process import Launch, ProcessEngine
from worker.settings import WorkerSettings

GOOD = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(b'{"data":[{"id":"tiny"}]}' if self.path == "/v1/models" else b"")
    def do_POST(self):
        if self.path == "/crash":
            os._exit(7)
        self.answer(str(os.getpid()).encode())
    def log_message(self, *args):
        pass
print("hello from the engine", flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
"""
GONE = r"broke the connection|cannot be reached"
"""A call on a kept connection is tried once more on a fresh one, which may find nobody."""
SERVES = GOOD + "server.serve_forever()\n"
DIES_AT_ONCE = "import sys; print('no accelerator found', flush=True); sys.exit(3)\n"
NEVER_READY = "import time; print('loading', flush=True); time.sleep(600)\n"
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES
HAS_A_CHILD = "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\n" + SERVES


@asynccontextmanager
async def supervised(
    script: str,
    folder: Path,
    *,
    ready_timeout_s: float = 20.0,
    stable_after_s: float = 60.0,
    restarted: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[ProcessEngine, list[EngineState]]]:
    file = folder / "engine.py"
    file.write_text(script)
    engine = ProcessEngine(
        "the test engine",
        {"tiny": lambda port: Launch((sys.executable, str(file), str(port)), {"FROM_THE_WORKER": "1"})},
        ready_timeout_s=ready_timeout_s,
        stable_after_s=stable_after_s,
        log_file=folder / "logs" / "engine.log",
        stop_timeout_s=1.0,
        restarted=restarted,
    )
    states: list[EngineState] = []
    task = asyncio.create_task(engine.run(lambda: states.append(engine.state)))
    try:
        yield engine, states
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.stop(1)


async def test_the_engine_sees_nothing_of_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A6] No INFERQ_* variable reaches it, in whichever case: the join token and Redis's password are among them."""
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "s3cret")
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://:s3cret@h:1/0")
    monkeypatch.setenv("inferq_worker_engine_api_key", "s3cret")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("FROM_THE_WORKER", "its user decides")
    seen = tmp_path / "seen.json"
    script = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))\n" + SERVES
    async with supervised(script, tmp_path) as (engine, _):
        await eventually(lambda: engine.state is EngineState.READY, "the engine is ready", limit_s=20)
    given = json.loads(seen.read_text())
    assert not [name for name in given if name.upper().startswith("INFERQ_")]
    assert "s3cret" not in seen.read_text()
    assert (given["HF_HOME"], given["FROM_THE_WORKER"]) == ("/models", "its user decides")


async def ready(engine: ProcessEngine) -> None:
    await eventually(lambda: engine.state is EngineState.READY, "the engine is ready", limit_s=20)


async def ask_pid(engine: ProcessEngine, path: str = "/pid") -> int:
    async with engine.call(EngineCall(path, b"")) as answer:
        return int(await answer.read(100))


async def test_it_starts_answers_and_ends(tmp_path: Path) -> None:
    """A good engine becomes ready on a free port, lists its models, is logged, and is gone at the end."""
    async with supervised(SERVES, tmp_path) as (engine, states):
        await ready(engine)
        assert engine.models == ("tiny",)
        assert states == [EngineState.STARTING, EngineState.READY]
        pid = await ask_pid(engine)
        assert is_alive(pid)
    await eventually(lambda: not is_alive(pid), "the engine is gone")
    assert "hello from the engine" in (tmp_path / "logs" / "engine.log").read_text()


async def test_a_crash_is_followed_by_a_restart(tmp_path: Path) -> None:
    """An engine that dies is FAILED, says why, and is back a second later on its own."""
    restarts: list[int] = []
    async with supervised(SERVES, tmp_path, restarted=lambda: restarts.append(1)) as (engine, states):
        await ready(engine)
        first = await ask_pid(engine)
        with pytest.raises(Exception, match=GONE):
            await ask_pid(engine, "/crash")
        await eventually(lambda: states[2:3] == [EngineState.FAILED], "the crash is seen")
        assert "exit code 7" in engine.detail
        await eventually(lambda: len(states) >= 5 and engine.state is EngineState.READY, "it is back", limit_s=20)
        assert await ask_pid(engine) != first
        assert restarts == [1]


async def test_an_engine_that_dies_at_start_tells_its_last_words(tmp_path: Path) -> None:
    """The reason that the engine printed is in the worker's detail, with where to read more."""
    async with supervised(DIES_AT_ONCE, tmp_path) as (engine, _):
        await eventually(lambda: engine.state is EngineState.FAILED, "the failure is seen")
        assert "exit code 3" in engine.detail
        assert "no accelerator found" in engine.detail
        assert "engine.log" in engine.detail
        assert "starting it again" in engine.detail


async def test_an_engine_that_crashes_again_and_again_is_restarted_ever_more_slowly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that gets ready every time and crashes at its first request, however long it takes to load: the pause
    doubles, and what the worker tells of it, starting or failed, says how often and why."""
    monkeypatch.setattr(process, "_BACKOFF", Backoff(0.25, 60.0, jitter=0))
    monkeypatch.setattr(process, "_REFRESH_S", 0.05)
    slow = SERVES.replace("server = ", "import time; time.sleep(0.3)\nserver = ")
    async with supervised(slow, tmp_path) as (engine, _):
        for times in (1, 2, 3):
            await ready(engine)
            with pytest.raises(Exception, match=GONE):
                await ask_pid(engine, "/crash")
            await eventually(lambda times=times: engine.failures == times, "the crash is counted")
        assert "starting it again in 1 s (it failed 3 times in a row)" in engine.detail
        await eventually(lambda: engine.state is EngineState.STARTING, "it starts again", every_s=0.001)
        assert "exit code 7" in engine.detail
        assert "3 times in a row" in engine.detail
        await ready(engine)
        assert engine.detail == ""


async def test_an_engine_that_was_well_for_a_while_is_restarted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[G7] One that crashes now and then does not wait longer each time: its failures are behind it once it was ready
    for ``engine_stable_after_ms``, 10 s unless set otherwise."""
    monkeypatch.setattr(process, "_BACKOFF", Backoff(0.05, 60.0, jitter=0))
    async with supervised(SERVES, tmp_path, stable_after_s=0.3) as (engine, _):
        for _ in range(4):
            await ready(engine)
            await asyncio.sleep(0.4)  # well for longer than that
            with pytest.raises(Exception, match=GONE):
                await ask_pid(engine, "/crash")
            await eventually(lambda: engine.state is EngineState.FAILED, "the crash is seen", every_s=0.001)
            await eventually(lambda: "starting it again in 0 s" in engine.detail, "no longer pause", every_s=0.001)
            assert engine.failures == 1
    settings = WorkerSettings.load(engine="sim-process")
    made = make_engine(settings)
    assert isinstance(made, ProcessEngine)
    assert made._stable_after_s == 10.0


async def test_an_engine_that_never_gets_ready_is_ended_and_reported(tmp_path: Path) -> None:
    """After the limit the engine is FAILED with its last lines, and its process is gone."""
    async with supervised(NEVER_READY, tmp_path, ready_timeout_s=0.7) as (engine, _):
        await eventually(lambda: engine.pid, "the process runs")
        pid = engine.pid
        assert pid is not None
        await eventually(lambda: engine.state is EngineState.FAILED, "the failure is seen")
        assert "not ready within" in engine.detail
        assert "loading" in engine.detail
        await eventually(lambda: not is_alive(pid), "the process is gone")


async def test_a_command_that_does_not_exist_is_a_clear_failure(tmp_path: Path) -> None:
    """The engine is FAILED with a sentence, not with a traceback."""
    engine = ProcessEngine(
        "nothing",
        {"tiny": lambda _port: Launch((str(tmp_path / "missing"),), {})},
        ready_timeout_s=5,
        stable_after_s=10,
        stop_timeout_s=1,
    )
    task = asyncio.create_task(engine.run(lambda: None))
    await eventually(lambda: engine.state is EngineState.FAILED, "the failure is seen")
    assert "cannot start" in engine.detail
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Stopping has an end: SIGKILL follows."""
    async with supervised(IGNORES_SIGTERM, tmp_path) as (engine, _):
        await ready(engine)
        pid = await ask_pid(engine)
    await eventually(lambda: not is_alive(pid), "the engine is gone")


async def test_what_the_engine_started_ends_with_it(tmp_path: Path) -> None:
    """The whole process group goes, when it is stopped and when the engine itself crashes."""
    async with supervised(HAS_A_CHILD, tmp_path) as (engine, states):
        await ready(engine)
        child = int(next(line for line in engine.log.last(50) if line.isdigit()))
        assert is_alive(child)
        with pytest.raises(Exception, match=GONE):
            await ask_pid(engine, "/crash")
        await eventually(lambda: EngineState.FAILED in states, "the crash is seen")
        await eventually(lambda: not is_alive(child), "the child is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel (/proc) who is alive")
async def test_the_engine_dies_with_its_worker(tmp_path: Path) -> None:
    """SIGKILL of the owner, which can clean up nothing, ends the engine and what it started."""
    script = tmp_path / "engine.py"
    script.write_text(IGNORES_SIGTERM.replace("import signal;", "import os, signal; print(os.getpid(), flush=True);"))
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {guard.__file__!r}, '1', sys.executable, {str(script)!r}, '0'],"
        " stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(600)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, str(owner), stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    assert is_alive(pid)
    process.send_signal(signal.SIGKILL)
    await eventually(lambda: not is_alive(pid), "the engine is gone")


async def test_a_full_disk_costs_the_log_file_only(tmp_path: Path) -> None:
    """The engine runs on when its log cannot be written."""
    blocked = tmp_path / "logs"
    blocked.write_text("a file where a folder is needed")
    async with supervised(SERVES, tmp_path) as (engine, _):
        await ready(engine)
        assert "hello from the engine" in engine.log.last(5)


async def test_it_serves_another_model_after_a_switch(tmp_path: Path) -> None:
    """The first process has ended before the second one starts; until that is ready no model is listed. Crashes
    restart the model that was switched to, and a switch ends a start that hangs, and the wait after a failure."""
    scripts = {"one": SERVES.replace("tiny", "one"), "hangs": NEVER_READY, "dies": DIES_AT_ONCE, "two": SERVES}
    for name, script in scripts.items():
        (tmp_path / f"{name}.py").write_text(script)

    def launch_of(name: str) -> Callable[[int], Launch]:
        return lambda port: Launch((sys.executable, str(tmp_path / f"{name}.py"), str(port)), {})

    launches = {name: launch_of(name) for name in scripts}
    engine = ProcessEngine("the test engine", launches, ready_timeout_s=20, stable_after_s=60, stop_timeout_s=1)
    assert (engine.loadable, engine.loaded) == (("one", "hangs", "dies", "two"), "one")
    task = asyncio.create_task(engine.run(lambda: None))
    await ready(engine)
    assert engine.models == ("one",)
    first = await ask_pid(engine)
    engine.switch("hangs")
    assert (engine.state, engine.models) == (EngineState.STARTING, ())
    await eventually(lambda: not is_alive(first), "the first process has ended")
    await eventually(lambda: "loading" in engine.log.last(9), "the second one starts")
    engine.switch("dies")
    await eventually(lambda: engine.state is EngineState.FAILED, "it fails")
    engine.switch("two")
    await ready(engine)
    assert engine.models == ("tiny",)
    second = await ask_pid(engine)
    with pytest.raises(EngineFailed, match=GONE):
        await ask_pid(engine, "/crash")
    await eventually(lambda: not is_alive(second) and engine.state is not EngineState.READY, "the crash is seen")
    await eventually(lambda: engine.state is EngineState.READY, "it is restarted", limit_s=20)
    assert (engine.models, engine.loaded) == (("tiny",), "two")
    last = await ask_pid(engine)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not is_alive(last)


def test_each_installed_model_has_its_command() -> None:
    """vLLM serves a folder under the name that clients use; the simulated engine takes the name."""
    settings = WorkerSettings.load(model="org/a", installed_models="b=/m/b,c", vllm_command=sys.executable)
    engine = make_engine(settings)
    assert isinstance(engine, ProcessEngine)
    assert (engine.loadable, engine.loaded) == (("org/a", "b", "c"), "org/a")
    commands = {model: launch(9).command for model, launch in engine._launches.items()}
    assert commands["b"][1:3] == ("serve", "/m/b")
    assert commands["b"][commands["b"].index("--served-model-name") + 1] == "b"
    assert all("--served-model-name" not in commands[model] for model in ("org/a", "c"))
    simulated = make_engine(WorkerSettings.load(engine="sim-process", model="a", installed_models="b"))
    assert isinstance(simulated, ProcessEngine)
    assert [launch(9).command[3:5] for launch in simulated._launches.values()] == [("--model", "a"), ("--model", "b")]
