"""The ways into a Router under Ray Serve, beside the Router's own process. ``python -m bench.ways_in``.

All in front of one engine, one Worker, one queue: ``http`` is the Router's process; ``replica`` a Serve replica that
listens itself; ``serve`` one behind Serve's proxy; ``haproxy`` one behind the HAProxy that Serve can run instead. Each
of the last three has a Ray of its own; CPU is that of all its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import cast

import ray
import uvloop
from ray import serve
from rich.console import Console

from broker import BrokerSettings
from queue_schemas import RAY_NAMESPACE
from router.ray_serve import Scale, WayIn, application
from router.settings import RouterSettings
from storage import StorageSettings
from telemetry import TelemetrySettings
from telemetry.environment import free_port
from webhooks.settings import WebhookSettings

from .processes import until_answers
from .ratios import LOADS, ratio_table, windows_in_turns
from .systems import MODEL, System, fake_engine, whole_inferq
from .windows import Measurement

WAYS: dict[str, tuple[WayIn, dict[str, str]]] = {
    "replica": ("replica", {}),
    "serve": ("serve", {}),
    "haproxy": ("serve", {"RAY_SERVE_ENABLE_HA_PROXY": "1"}),
}
START_LIMIT_S = 120.0
STOP_LIMIT_S = 60.0


def _serve_one(way: str, port: int, redis_url: str) -> None:
    """What a child process does: one Ray with one replica, until its standard input ends."""
    way_in, _ = WAYS[way]
    ray.init(
        namespace=RAY_NAMESPACE,
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    location = "NoServer" if way_in == "replica" else "HeadOnly"
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": location})
    settings = RouterSettings.load(port=port)
    broker = BrokerSettings.load(redis_url=redis_url)
    reporting = TelemetrySettings.load(log_level="warning")
    serve.run(
        application(
            settings,
            broker,
            StorageSettings.load(),
            WebhookSettings.load(),
            reporting,
            way_in=way_in,
            scale=Scale(min_replicas=1, max_replicas=1),
        ),
        name="bench",
        route_prefix="/",
    )
    sys.stdin.read()
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


@asynccontextmanager
async def _ray(way: str, redis_url: str, base: System, log: Path) -> AsyncIterator[System]:
    port = free_port()
    environment = {**os.environ, **WAYS[way][1], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with log.open("wb") as output:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.ways_in", "--serve-one", way, "--port", str(port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**environment, "BENCH_REDIS_URL": redis_url},
        )
    assert child.stdin is not None
    try:
        await until_answers(f"http://127.0.0.1:{port}/v1/models", log, wanted=f'"{MODEL}"')
        others = {name: pid for name, pid in base.pids.items() if name != "router"}
        yield System(way, port, {**others, "ray": child.pid})
    finally:
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), STOP_LIMIT_S)
        except TimeoutError:
            child.kill()
            await child.wait()


async def _windows(options: argparse.Namespace, folder: Path, console: Console) -> list[Measurement]:
    async with AsyncExitStack() as exits:
        engine_port, _ = await exits.enter_async_context(fake_engine(folder))
        engine_url = f"http://127.0.0.1:{engine_port}"
        fabric, redis_url = await exits.enter_async_context(whole_inferq(folder, engine_url))
        systems = [System("http", fabric.port, fabric.pids)]
        systems += [
            await exits.enter_async_context(_ray(way, redis_url, fabric, folder / f"{way}.log")) for way in options.ways
        ]
        return await windows_in_turns(systems, LOADS, options.rounds, console)


async def _all(options: argparse.Namespace, console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        found = await _windows(options, Path(name), console)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, Ray {ray.__version__}; "
        f"medians of {options.rounds} rounds, in brackets the median ratio to http"
    )
    console.print(ratio_table(found, LOADS, ("http", *options.ways)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.ways_in", description="The ways into a Router under Ray.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", action="append", dest="ways", choices=list(WAYS), help="one of them; repeatable")
    parser.add_argument("--serve-one", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.ways = options.ways or list(WAYS)
    if options.serve_one:
        _serve_one(cast(str, options.serve_one), options.port, os.environ["BENCH_REDIS_URL"])
    else:
        uvloop.run(_all(options, Console(width=140)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
