"""The systems that are measured, all in front of one fake engine, all up at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from broker.embedded.server import EmbeddedServer
from telemetry.environment import free_port

from . import native, peers
from .processes import DidNotStart, new_folder, running, running_program, until_answers

MODEL = "sim"
SLOTS = 512
SYSTEMS = ("direct", "nginx", "vllm-router", "proxy", "inferq")
OPTIONAL_SYSTEMS = ("litellm",)

_NGINX = """
daemon off; worker_processes auto; pid nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 8192; }}
http {{
    access_log off; server_tokens off; tcp_nodelay on;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi; client_max_body_size 0; client_body_buffer_size 128k;
    keepalive_timeout 1h; keepalive_requests 1000000000;
    upstream engine {{
        server 127.0.0.1:{engine_port}; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 1h;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""
_LITELLM = """
model_list:
  - model_name: {model}
    litellm_params: {{model: hosted_vllm/{model}, api_base: "http://127.0.0.1:{engine_port}/v1", api_key: none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
litellm_settings: {{telemetry: false}}
"""


@dataclass(frozen=True, slots=True)
class System:
    """Where to send requests, and the processes whose CPU time counts, by name; that of the engine does not."""

    name: str
    port: int
    pids: Mapping[str, int]
    engine_pid: int = 0


class NotHere(Exception):
    """A system that cannot be measured on this machine; the message says why."""


@asynccontextmanager
async def started_systems(
    folder: Path, names: Sequence[str], say: Callable[[str], None]
) -> AsyncIterator[list[System]]:
    """Those of ``names`` that this machine can run. ``say`` hears of each left out."""
    async with AsyncExitStack() as exits:
        port, engine_pid = await exits.enter_async_context(fake_engine(folder))
        systems = []
        for name in names:
            try:
                system = await exits.enter_async_context(_STARTERS[name](new_folder(folder / name), port))
                systems.append(replace(system, engine_pid=engine_pid))
            except (NotHere, DidNotStart, peers.NotInstalled) as error:
                if name in ("direct", "inferq", "proxy"):
                    raise
                say(f"{name} is left out: {error}")
        yield systems


@asynccontextmanager
async def fake_engine(folder: Path, *options: str) -> AsyncIterator[tuple[int, int]]:
    """The fake engine: its port and process id. ``options`` are those of ``engine.c``."""
    port, log = free_port(), folder / "engine.log"
    async with running_program([native.engine(), str(port), "--model", MODEL, *options], log) as pid:
        await until_answers(f"http://127.0.0.1:{port}/health", log, pid=pid)
        yield port, pid


@asynccontextmanager
async def _direct(_folder: Path, engine_port: int) -> AsyncIterator[System]:
    yield System("direct", engine_port, {})


@asynccontextmanager
async def _nginx(folder: Path, engine_port: int) -> AsyncIterator[System]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise NotHere("nginx is not installed (apt-get install nginx-light)")
    port, log = free_port(), folder / "nginx.log"
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(_NGINX.format(port=port, engine_port=engine_port, user=user))
    command = [nginx, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    async with running_program(command, log) as pid:
        await until_answers(f"http://127.0.0.1:{port}/health", log, pid=pid)
        yield System("nginx", port, {"nginx": pid})


@asynccontextmanager
async def _vllm_router(folder: Path, engine_port: int) -> AsyncIterator[System]:
    program = peers.program("vllm-router")
    port, log = free_port(), folder / "vllm-router.log"
    command: list[str | Path] = [
        *(program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine_port}"),
        *("--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())),
    ]
    async with running_program(command, log, env=peers.environment()) as pid:
        await until_answers(f"http://127.0.0.1:{port}/v1/models", log, wanted=f'"{MODEL}"', pid=pid)
        yield System("vllm-router", port, {"vllm-router": pid})


@asynccontextmanager
async def _litellm(folder: Path, engine_port: int) -> AsyncIterator[System]:
    program = peers.program("litellm", extra="litellm")
    port, log, config = free_port(), folder / "litellm.log", folder / "litellm.yaml"
    config.write_text(_LITELLM.format(model=MODEL, engine_port=engine_port))
    command: list[str | Path] = [
        program,
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    async with running_program(command, log, env=peers.environment()) as pid:
        await until_answers(f"http://127.0.0.1:{port}/v1/models", log, wanted=f'"{MODEL}"', limit_s=180, pid=pid)
        yield System("litellm", port, {"litellm": pid})


@asynccontextmanager
async def _proxy(folder: Path, engine_port: int) -> AsyncIterator[System]:
    port, log = free_port(), folder / "proxy.log"
    options = ("--engine-url", f"http://127.0.0.1:{engine_port}", "--port", str(port))
    async with running("bench.proxy", options, log) as pid:
        await until_answers(f"http://127.0.0.1:{port}/openapi.json", log, pid=pid)
        yield System("proxy", port, {"proxy": pid})


@asynccontextmanager
async def _inferq(folder: Path, engine_port: int) -> AsyncIterator[System]:
    async with whole_inferq(folder, f"http://127.0.0.1:{engine_port}") as (system, _):
        yield system


_STARTERS: Mapping[str, Callable[[Path, int], contextlib.AbstractAsyncContextManager[System]]] = {
    "direct": _direct,
    "nginx": _nginx,
    "vllm-router": _vllm_router,
    "proxy": _proxy,
    "inferq": _inferq,
    "litellm": _litellm,
}


@asynccontextmanager
async def whole_inferq(
    folder: Path,
    *engine_urls: str,
    slots: int = SLOTS,
    workers: int = 1,
    transport: str = "redis",
    router_options: Sequence[str] = (),
    worker_options: Sequence[str] = (),
) -> AsyncIterator[tuple[System, str]]:
    """Queue, Manager, Router and ``workers`` Workers, which take the engines in turn; and the queue's URL, for other
    roles."""
    async with queue_and_manager(folder) as (queue, manager_pid, manager_url), AsyncExitStack() as exits:
        port, router_log = free_port(), folder / "router.log"
        quiet = ("--log-level", "warning")
        options = ("--port", str(port), "--manager-url", manager_url, "--redis-url", queue.url, *quiet)
        router_pid = await exits.enter_async_context(running("router.service", (*options, *router_options), router_log))
        pids = {"router": router_pid, "manager": manager_pid, "redis": queue.pid or 0}
        for number in range(workers):
            name = "worker" if number == 0 else f"worker-{number}"
            pids[name] = await exits.enter_async_context(
                worker(
                    folder,
                    name,
                    f"http://127.0.0.1:{port}",
                    queue.url,
                    engine_urls[number % len(engine_urls)],
                    slots=slots,
                    transport=transport,
                    options=worker_options,
                )
            )
        await until_answers(f"http://127.0.0.1:{port}/v1/models", router_log, wanted=f'"{MODEL}"')
        yield System("inferq", port, pids), queue.url


@asynccontextmanager
async def with_batcher(
    folder: Path,
    engine_url: str,
    *,
    slots: int,
    worker_options: Sequence[str] = (),
    batcher_options: Sequence[str] = (),
) -> AsyncIterator[tuple[System, str]]:
    """The same with a batcher, which keeps its files in ``folder``."""
    os.environ["INFERQ_STORAGE_URL"] = str(folder / "store")
    async with whole_inferq(folder, engine_url, slots=slots, worker_options=worker_options) as (system, queue_url):
        port, log = free_port(), folder / "batcher.log"
        options = ("--port", str(port), "--redis-url", queue_url, "--log-level", "warning")
        async with running("batches.service", (*options, *batcher_options), log) as pid:
            await until_answers(f"http://127.0.0.1:{port}/readyz", log)
            yield System(system.name, system.port, {**system.pids, "batcher": pid}), queue_url


@asynccontextmanager
async def worker(
    folder: Path,
    name: str,
    manager_url: str,
    redis_url: str,
    engine_url: str,
    *,
    slots: int = SLOTS,
    transport: str = "redis",
    options: Sequence[str] = (),
) -> AsyncIterator[int]:
    """A Worker that is ready: its process id."""
    port, log = free_port(), folder / f"{name}.log"
    arguments = (
        *("--worker-id", f"bench-{name}", "--port", str(port), "--slots", str(slots), "--manager-url", manager_url),
        # Without a join token, nobody tells a worker the password of the embedded queue.
        *(("--redis-url", redis_url) if transport == "redis" else ()),
        *("--transport", transport, "--engine-url", engine_url, "--log-level", "warning", *options),
    )
    async with running("worker.service", arguments, log) as pid:
        await until_answers(f"http://127.0.0.1:{port}/readyz", log, pid=pid)
        yield pid


@asynccontextmanager
async def queue_and_manager(folder: Path) -> AsyncIterator[tuple[EmbeddedServer, int, str]]:
    """An embedded queue and a Manager on it: the server, the Manager's process id and URL."""
    async with EmbeddedServer(folder / "valkey") as queue:
        port, log = free_port(), folder / "manager.log"
        options = ("--port", str(port), "--redis-url", queue.url, "--log-level", "warning")
        async with running("manager.service", options, log) as pid:
            url = f"http://127.0.0.1:{port}"
            await until_answers(f"{url}/readyz", log, pid=pid)
            yield queue, pid, url
