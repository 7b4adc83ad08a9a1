"""Real vLLM: set up through the same code as `make up`, and a fleet of two workers with one engine each."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from rich.console import Console

from inferq.vllm_setup import DEFAULT_MODEL, ConsoleProgress, VllmEnvironment, prepare_default_model, prepare_vllm
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually

ENGINE_READY_LIMIT_S = 300.0
PRODUCTION_TIMES = {
    "lease_ms": 15_000,
    "heartbeat_interval_ms": 2_000,
    "unresponsive_after_ms": 6_000,
    "leader_lease_ms": 6_000,
}
"""Engines use every core: with the short times of other tests, a busy machine would look like a dead worker."""


@dataclass(frozen=True, slots=True)
class RealFleet:
    """A fleet whose workers each run a vLLM of their own."""

    fleet: Fleet

    @property
    def engines(self) -> tuple[str, ...]:
        """Of each worker, the URL of its vLLM: another one after each start."""
        return tuple(_engine_url(worker) for worker in self.fleet.workers)


@pytest.fixture(scope="session")
def vllm() -> VllmEnvironment:
    """The environment that `make up` uses; made now where it is not there."""
    return prepare_vllm(ConsoleProgress(Console(stderr=True)))


@pytest.fixture(scope="session")
def model_folder(vllm: VllmEnvironment) -> Path:
    """The default model's folder."""
    return prepare_default_model(vllm, ConsoleProgress(Console(stderr=True)))


@pytest.fixture(scope="session")
def session_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The queue of the fleet."""
    with Server(server_binary(), tmp_path_factory.mktemp("vllm-queue")) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def real(
    vllm: VllmEnvironment, model_folder: Path, session_valkey: Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RealFleet]:
    """Manager, Router and two workers, each with a vLLM of its own as a subprocess."""
    environment = {"OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("vllm-fleet")
    async with Fleet(folder, session_valkey, manager=PRODUCTION_TIMES, env=environment) as fleet:
        for name in ("worker-1", "worker-2"):
            fleet.worker(
                name,
                engine="vllm",
                model=model_folder,
                served_model_name=DEFAULT_MODEL,
                vllm_command=vllm.command,
                vllm_device=vllm.device,
                vllm_args=shlex.join(
                    ["--max-model-len", "2048", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
                ),
                slots=8,
            )
        for role in (fleet.manager, fleet.router, *fleet.workers):
            role.process.start()
        for role in (fleet.manager, fleet.router):
            await role.ready()
        for worker in fleet.workers:
            await until_engine_ready(worker)
        await fleet.until_served(2, DEFAULT_MODEL)
        yield RealFleet(fleet)


async def until_engine_ready(worker: Role) -> None:
    async def ready() -> bool:
        assert worker.process.running, f"{worker.name} ended\n{worker.process.log_tail()}"
        return (await worker.get("/readyz"))[0] == 200

    what = f"{worker.name} has its vLLM ready"
    try:
        await eventually(ready, what, limit_s=ENGINE_READY_LIMIT_S, every_s=0.2)
    except AssertionError as error:
        logs = [
            path.read_text("utf-8", "replace")[-3_000:] for path in worker.process.log_path.parent.rglob("*.engine.log")
        ]
        raise AssertionError("\n".join([str(error), worker.process.log_tail(), *logs])) from None


def _engine_url(worker: Role) -> str:
    """Where a worker's vLLM listens: the port is free and changes, the worker's log tells it."""
    lines = (json.loads(line) for line in worker.process.log_text().splitlines() if line.startswith("{"))
    ports = [line["port"] for line in lines if line.get("event") == "engine_ready"]
    return f"http://127.0.0.1:{ports[-1]}"
