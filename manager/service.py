"""Run a Manager process: ``python -m manager.service``, also for ``inferq manager`` and ``inferq up``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import cast

from broker import Broker, BrokerSettings
from broker.redis.link import open_link
from telemetry import TelemetrySettings, get_logger
from telemetry.flags import parse_settings
from telemetry.http.advertised_url import advertised_url
from telemetry.http.server import bind_socket, refuse_unguarded, run_process, run_server, stop_on_signals
from telemetry.reporting import reporting

from .control_plane import ManagerService, OpenQueue
from .ports import QueuePort
from .probe import HttpWorkerProbe
from .routes import create_app
from .settings import ManagerSettings

__all__ = ["ManagerService", "main", "open_broker", "serve"]

log = get_logger("manager.service")


def open_broker(settings: BrokerSettings) -> OpenQueue:
    """How a Manager opens the real queue."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[QueuePort]:
        broker = await Broker.connect(settings)
        try:
            yield broker
        finally:
            await broker.close()

    return opened


async def serve(
    settings: ManagerSettings, broker_settings: BrokerSettings, *, stop: asyncio.Event | None = None
) -> None:
    """The Manager's process: the service and its API, until ``stop`` is set, or SIGTERM or SIGINT without ``stop``.

    Without a Redis URL it starts the embedded server on ``data_dir``. Raises ``CannotStart`` or ``BrokerUnsuitable``
    with a sentence that says what to correct.
    """
    token = settings.join_token.get_secret_value()
    refuse_unguarded(
        settings.host,
        guarded=bool(token),
        insecure=settings.insecure,
        remedy="set a join token (INFERQ_JOIN_TOKEN), which workers and routers then show",
    )
    if broker_settings.redis_url:
        open_link(broker_settings)  # connects to nothing: it only reads the URL
    async with AsyncExitStack() as exits:
        listener = exits.enter_context(bind_socket(settings.host, settings.port))
        hurry = asyncio.Event()
        stopped = stop or exits.enter_context(stop_on_signals(hurry))
        tasks = await exits.enter_async_context(asyncio.TaskGroup())
        if not broker_settings.redis_url:
            from broker.embedded.server import EmbeddedServer  # noqa: PLC0415 - needs a POSIX system

            server = await exits.enter_async_context(EmbeddedServer(Path(settings.data_dir) / "valkey"))
            tasks.create_task(server.watch(), name="embedded queue")
            log.info("embedded_queue", port=server.port, data=str(server.data_dir))
            broker_settings = broker_settings.model_copy(update={"redis_url": server.url})
        probe = await exits.enter_async_context(HttpWorkerProbe(settings.probe_timeout_s))
        host, port = listener.getsockname()[:2]
        redis_url = broker_settings.redis_url
        url = settings.advertise_url or await asyncio.to_thread(advertised_url, settings.host, port, redis_url)
        service = ManagerService(settings, open_broker(broker_settings), probe, broker_url=redis_url, url=url)
        log.info("listening", url=f"http://{host}:{port}")
        served = tasks.create_task(
            run_server(
                create_app(service),
                sock=listener,
                stop=stopped,
                hurry=hurry,
                shutdown_timeout_s=settings.shutdown_timeout_ms / 1000,
            )
        )
        await service.run(stopped)
        await served


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m manager.service``: the same as ``inferq manager``. The exit code."""

    async def run() -> None:
        tables = (ManagerSettings, BrokerSettings, TelemetrySettings)
        own, queue, telemetry = parse_settings("inferq manager", "The Manager of an inferq fabric.", argv, *tables)
        with reporting("manager", cast(TelemetrySettings, telemetry)):
            await serve(cast(ManagerSettings, own), cast(BrokerSettings, queue))

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
