"""A Manager and a Router on real ports in one thread, over a real queue, for clients that know no asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from broker import Broker, BrokerSettings
from manager import ManagerService, ManagerSettings, create_app
from manager.probe import HttpWorkerProbe
from queue_schemas import Pool
from router import RouterSettings, build_router
from storage import StorageSettings
from telemetry.environment import free_port
from telemetry.http.server import run_server
from tests.support.servers import Server
from tests.support.waiting import eventually

MODEL = Pool("sim/tiny:v1")
LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Fabric:
    """Where the two listen."""

    manager_url: str
    router_url: str


@contextmanager
def running_fabric(queue: Server, join_token: str = "") -> Iterator[Fabric]:
    """Both, ready, until the block ends; a fault of theirs is raised here."""
    ports = free_port(), free_port()
    fabric = Fabric(*(f"http://127.0.0.1:{port}" for port in ports))
    ready, ended = threading.Event(), threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    faults: list[BaseException] = []

    def live() -> None:
        async def serve() -> None:
            stop = asyncio.Event()
            loops.append((asyncio.get_running_loop(), stop))
            await _serve(*ports, queue.url, join_token, stop, ready)

        try:
            asyncio.run(serve())
        except BaseException as fault:  # noqa: BLE001 - raised where the test can see it
            faults.append(fault)
        finally:
            ready.set()
            ended.set()

    threading.Thread(target=live, name="fabric", daemon=True).start()
    assert ready.wait(LIMIT_S), "the fabric is not ready"
    try:
        if not faults:
            yield fabric
    finally:
        for loop, stop in loops:
            if not ended.is_set():
                loop.call_soon_threadsafe(stop.set)
        assert ended.wait(LIMIT_S), "the fabric does not end"
        if faults:
            raise faults[0]


async def _serve(
    manager_port: int, router_port: int, queue_url: str, join_token: str, stop: asyncio.Event, ready: threading.Event
) -> None:
    async def open_queue() -> Broker:
        return await Broker.connect(BrokerSettings(redis_url=queue_url, retry_limit_ms=2_000))

    @asynccontextmanager
    async def opened() -> AsyncIterator[Broker]:
        broker = await open_queue()
        try:
            yield broker
        finally:
            await broker.close()

    settings = ManagerSettings(join_token=join_token, ping_timeout_ms=50, probe_timeout_ms=50)
    async with HttpWorkerProbe(settings.probe_timeout_s) as probe:
        service = ManagerService(settings, opened, probe, broker_url="redis://nowhere")
        router = build_router(
            RouterSettings(
                manager_urls=[f"http://127.0.0.1:{manager_port}"],
                join_token=join_token,
                pools=[MODEL],
                sweep_interval_ms=20,
            ),
            storage_settings=StorageSettings(url=f"memory://outsiders-{router_port}"),
            open_queue=open_queue,
        )
        async with router.running(), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            for app, port in ((create_app(service), manager_port), (router, router_port)):
                tasks.create_task(run_server(app, port=port, stop=stop, shutdown_timeout_s=1))
            await eventually(
                lambda: service.acting and not router.services.not_ready_reasons(), "both are ready", limit_s=LIMIT_S
            )
            ready.set()
