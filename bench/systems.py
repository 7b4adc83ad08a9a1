"""The systems that are measured, all in front of one simulated engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from broker.embedded.server import EmbeddedServer
from telemetry.environment import free_port

from .processes import running, until_answers

MODEL = "sim"
SLOTS = 512


@dataclass(frozen=True, slots=True)
class System:
    """Where to send requests, and the processes whose CPU time counts, by name."""

    name: str
    port: int
    pids: Mapping[str, int]


@asynccontextmanager
async def started_systems(
    folder: Path, engine_options: Sequence[str], names: Sequence[str]
) -> AsyncIterator[list[System]]:
    """Those of "direct" (the engine alone), "proxy" and "inferq" that ``names`` has, on an engine with its options."""
    async with AsyncExitStack() as exits:
        port = await exits.enter_async_context(simulated_engine(folder, engine_options))
        engine_url = f"http://127.0.0.1:{port}"
        systems = [System("direct", port, {})] if "direct" in names else []
        if "proxy" in names:
            systems.append(await exits.enter_async_context(_proxy(folder, engine_url)))
        if "inferq" in names:
            systems.append((await exits.enter_async_context(whole_inferq(folder, engine_url)))[0])
        yield systems


@asynccontextmanager
async def simulated_engine(folder: Path, engine_options: Sequence[str]) -> AsyncIterator[int]:
    """The engine's port."""
    port, log = free_port(), folder / "engine.log"
    options = ("--port", str(port), "--model", MODEL, "--max-num-seqs", "4096", *engine_options)
    async with running("worker.engines.simulated", options, log):
        await until_answers(f"http://127.0.0.1:{port}/health", log)
        yield port


@asynccontextmanager
async def _proxy(folder: Path, engine_url: str) -> AsyncIterator[System]:
    port, log = free_port(), folder / "proxy.log"
    async with running("bench.proxy", ("--engine-url", engine_url, "--port", str(port)), log) as pid:
        await until_answers(f"http://127.0.0.1:{port}/openapi.json", log)
        yield System("proxy", port, {"proxy": pid})


@asynccontextmanager
async def whole_inferq(folder: Path, engine_url: str, *, slots: int = SLOTS) -> AsyncIterator[tuple[System, str]]:
    """Queue, Manager, Router and one Worker; and the queue's URL, for other roles."""
    async with queue_and_manager(folder) as (queue, manager_pid, manager_url), AsyncExitStack() as exits:
        port, router_log, worker_log = free_port(), folder / "router.log", folder / "worker.log"
        quiet = ("--log-level", "warning")
        router_options = ("--port", str(port), "--manager-url", manager_url, "--redis-url", queue.url, *quiet)
        router_pid = await exits.enter_async_context(running("router.service", router_options, router_log))
        worker_options = (
            *("--worker-id", "bench", "--port", "0", "--slots", str(slots)),
            # Without a join token, nobody tells a worker the password of the embedded queue.
            *("--manager-url", f"http://127.0.0.1:{port}", "--redis-url", queue.url),
            *("--engine-url", engine_url, *quiet),
        )
        worker_pid = await exits.enter_async_context(running("worker.service", worker_options, worker_log))
        await until_answers(f"http://127.0.0.1:{port}/v1/models", router_log, wanted=f'"{MODEL}"')
        pids = {"router": router_pid, "worker": worker_pid, "manager": manager_pid, "redis": queue.pid or 0}
        yield System("inferq", port, pids), queue.url


@asynccontextmanager
async def queue_and_manager(folder: Path) -> AsyncIterator[tuple[EmbeddedServer, int, str]]:
    """An embedded queue and a Manager on it: the server, the Manager's process id and URL."""
    async with EmbeddedServer(folder / "valkey") as queue:
        port, log = free_port(), folder / "manager.log"
        options = ("--port", str(port), "--redis-url", queue.url, "--log-level", "warning")
        async with running("manager.service", options, log) as pid:
            url = f"http://127.0.0.1:{port}"
            await until_answers(f"{url}/readyz", log)
            yield queue, pid, url
