"""`inferq up` as a person runs it: one command, everything there; one Ctrl-C, nothing left."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from inferq.client import RequestFailed
from telemetry.environment import free_port
from tests.support.clients import RouterUser
from tests.support.command_line import inferq
from tests.support.processes import Child, environment, is_alive
from tests.support.servers import Server
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
READY_LIMIT_S = 60.0
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Up:
    """One `inferq up`, and what it said it runs."""

    process: Child
    output: Path

    async def ready(self) -> dict[str, Any]:
        """Its JSON line, waited for."""

        def line() -> bool:
            assert self.process.running, f"up ended with {self.process.returncode}\n{self.process.log_tail()}"
            return self.output.exists() and self.output.read_text().endswith("\n")

        await eventually(line, "inferq up is ready", limit_s=READY_LIMIT_S, every_s=0.05)
        found: dict[str, Any] = json.loads(self.output.read_text().splitlines()[-1])
        return found

    async def ended(self, limit_s: float = 60.0) -> int:
        """Its exit code, waited for."""
        await eventually(lambda: not self.process.running, "inferq up ends", limit_s=limit_s)
        assert self.process.returncode is not None
        return self.process.returncode


StartUp = Callable[..., Up]


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """Starts `inferq up` with simulated engines on free ports; whatever is left of it ends with the test."""
    started: list[Up] = []

    def start(*options: str, engine: str = "sim", env: Mapping[str, str] | None = None) -> Up:
        output = tmp_path / f"up-{len(started)}.out"
        clean = environment()
        clean |= {"PYTHONPATH": str(ROOT), **(env or {})}
        ports = [part for role in ("router", "manager", "worker") for part in (f"--{role}-port", "0")]
        command = [sys.executable, "-m", "inferq", "up", "--engine", engine, "--json", *ports, *options]
        # The shell keeps answers apart from what is said on the way; exec, so that signals reach inferq.
        script = f'exec "$@" > {output}'
        args = ["sh", "-c", script, "up", *command]
        up = Up(Child("up", args, tmp_path / f"up-{len(started)}.log", env=clean, cwd=tmp_path), output)
        started.append(up)
        up.process.start()
        return up

    yield start
    for up in started:
        up.process.kill_group()


def _queue_pids(folder: Path) -> list[int]:
    """The embedded servers that run on ``folder``."""
    found = []
    for page in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = page.read_bytes()
        except OSError:
            continue
        if b"valkey-server" in command and str(folder).encode() in command:
            found.append(int(page.parent.name))
    return found


async def test_one_command_serves_and_ctrl_c_leaves_nothing(start_up: StartUp, tmp_path: Path) -> None:
    """Queue, Manager, Router, services and two workers answer; SIGINT ends every process, and the exit code is 0."""
    up = start_up("--workers", "2")
    stack = await up.ready()
    assert set(stack["pids"]) == {"manager", "router", "batcher", "notifier", "worker-1", "worker-2"}
    async with RouterUser(stack["router_url"]) as client:
        assert (await client.chat("sim", HELLO, max_tokens=8)).text
        assert {worker.worker_id for worker in (await client.workers()).workers} == {"worker-1", "worker-2"}
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    at = ("--router-url", stack["router_url"])
    code, output, said = await inferq(tmp_path, "batch", "submit", "prompts.txt", "--watch", "--json", *at)
    assert (code, json.loads(output)["request_counts"]["completed"]) == (0, 2), said
    queue = _queue_pids(tmp_path)
    assert len(queue) == 1
    up.process.send(signal.SIGINT)
    assert await up.ended() == 0, up.process.log_tail()
    assert [pid for pid in [*stack["pids"].values(), *queue] if is_alive(pid)] == []
    assert "Stopped." in up.process.log_text()


async def test_a_second_run_continues_on_the_same_data(start_up: StartUp) -> None:
    """What the queue remembers outlives the run: a model of yesterday's worker is known before any worker came."""
    up = start_up("--model", "yesterday")
    await up.ready()
    up.process.send(signal.SIGTERM)
    assert await up.ended() == 0, up.process.log_tail()
    again = start_up("--workers", "0")
    stack = await again.ready()
    async with RouterUser(stack["router_url"]) as client:
        assert [pool.workers for pool in await client.pools() if pool.model == "yesterday"] == [0]


async def test_a_killed_role_is_started_again(start_up: StartUp) -> None:
    """A Router that was SIGKILLed serves again on its port, without anybody's help."""
    up = start_up()
    stack = await up.ready()
    os.kill(stack["pids"]["router"], signal.SIGKILL)

    async def served() -> bool:
        async with RouterUser(stack["router_url"]) as client:
            try:
                return bool((await client.chat("sim", HELLO, max_tokens=4)).text)
            except RequestFailed:
                return False

    await eventually(lambda: not is_alive(stack["pids"]["router"]), "the Router is gone")
    await eventually(served, "the Router serves again", limit_s=30, every_s=0.1)
    assert "router ended with code -9; starting it again" in up.process.log_text()


async def test_a_drained_worker_stays_down(start_up: StartUp) -> None:
    """A worker that was told to leave is not started again: `up` says so, and the others serve on."""
    up = start_up("--workers", "2")
    stack = await up.ready()
    async with RouterUser(stack["router_url"]) as client:
        session = aiohttp.ClientSession()
        async with session, session.post(f"{stack['router_url']}/fabric/v1/workers/worker-1/drain") as answer:
            assert answer.status == 202
        said = "worker-1 was drained on order and stays down"
        await eventually(lambda: said in up.process.log_text(), "up says so", limit_s=20)
        assert (await client.chat("sim", HELLO, max_tokens=4)).text

        async def alone() -> bool:
            return [worker.worker_id for worker in (await client.workers()).workers] == ["worker-2"]

        await eventually(alone, "worker-2 is alone", limit_s=20)
    assert not is_alive(stack["pids"]["worker-1"])
    assert "starting it again" not in up.process.log_text()
    up.process.send(signal.SIGINT)
    assert await up.ended() == 0, up.process.log_tail()


async def test_nothing_outlives_a_killed_up(start_up: StartUp, tmp_path: Path) -> None:
    """SIGKILL of `inferq up` itself takes every process with it, the queue's server too."""
    up = start_up()
    stack = await up.ready()
    pids = [*stack["pids"].values(), *_queue_pids(tmp_path)]
    up.process.send(signal.SIGKILL)
    await eventually(lambda: not any(map(is_alive, pids)), "every process has ended", limit_s=20)


@pytest.mark.parametrize("role", ["router", "manager", "worker"])
async def test_a_taken_port_is_one_clear_sentence(start_up: StartUp, role: str) -> None:
    """The sentence names the port and the flag that changes it; nothing is left running."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        up = start_up(f"--{role}-port", str(port))
        assert await up.ended() == 2
    said = up.process.log_text().strip().splitlines()
    assert said[-1].startswith(f"inferq: port {port} on 127.0.0.1 is taken")
    assert f"--{role}-port" in said[-1]


async def test_a_redis_of_ones_own_is_used_and_its_password_is_not_shown(
    start_up: StartUp, tmp_path: Path, own_valkey: Server
) -> None:
    """With --redis-url no server is embedded."""
    own_valkey.ask("CONFIG", "SET", "requirepass", "s3cret")
    url = own_valkey.url.replace("redis://", "redis://:s3cret@")
    up = start_up("--redis-url", url)
    stack = await up.ready()
    assert "s3cret" not in json.dumps(stack)
    assert _queue_pids(tmp_path / ".inferq") == []
    async with RouterUser(stack["router_url"]) as client:
        assert (await client.chat("sim", HELLO, max_tokens=4)).text
    assert "s3cret" not in up.process.log_text()


async def test_a_redis_that_is_not_there_is_one_clear_sentence(start_up: StartUp) -> None:
    """`inferq up` does not wait for a Redis that does not answer: it says so and ends."""
    up = start_up("--redis-url", f"redis://127.0.0.1:{free_port()}/0")
    assert await up.ended() == 2
    assert up.process.log_text().strip().splitlines()[-1].startswith("inferq: ")


async def test_a_role_that_refuses_to_start_ends_the_stack_with_its_reason(start_up: StartUp) -> None:
    """A setting that the Router cannot accept stops everything, and the Router's own sentence is the last word."""
    up = start_up(env={"INFERQ_ROUTER_API_KEYS": "not a hash"})
    assert await up.ended() == 2
    last = up.process.log_text().strip().splitlines()[-1]
    assert last.startswith("inferq: router cannot be kept running: ")


async def test_an_engine_that_runs_already_is_attached(start_up: StartUp, tmp_path: Path) -> None:
    """With --engine-url the workers serve what that server lists."""
    port = free_port()
    args = [sys.executable, "-m", "worker.engines.simulated", "--port", str(port), "--model", "attached"]
    engine = Child("engine", args, tmp_path / "engine.log", env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    engine.start()
    try:
        up = start_up("--engine-url", f"http://127.0.0.1:{port}", engine="url")
        stack = await up.ready()
        async with RouterUser(stack["router_url"]) as client:
            await eventually(lambda: _lists(client, "attached"), "the model is listed", limit_s=20)
            assert (await client.chat("attached", HELLO, max_tokens=4)).text
    finally:
        engine.kill_group()


async def _lists(client: RouterUser, model: str) -> bool:
    return model in await client.models()
