"""The Router's process: ``python -m router.service``, the same as ``inferq router``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import cast

from broker import BrokerSettings
from storage import StorageSettings
from telemetry import (
    TelemetrySettings,
    get_logger,
)
from telemetry.flags import parse_settings
from telemetry.http.server import bind_socket, run_process, run_server, stop_on_signals
from telemetry.reporting import reporting
from webhooks.settings import WebhookSettings

from .app import build_router
from .settings import RouterSettings

log = get_logger("router.service")


async def serve(
    settings: RouterSettings,
    broker_settings: BrokerSettings | None = None,
    storage_settings: StorageSettings | None = None,
    webhook_settings: WebhookSettings | None = None,
    *,
    stop: asyncio.Event | None = None,
    hurry: asyncio.Event | None = None,
) -> None:
    """Run a Router until ``stop`` is set, or without it until SIGTERM or SIGINT; then end it in good order: in time for
    the open requests, or once ``hurry`` is set (a second signal) with an error for each of them.

    Raises ``CannotStart`` if the settings cannot work or the port is taken. Redis, the Manager
    and the file store need not be there.
    """
    if stop is None:
        with stop_on_signals(hurry := asyncio.Event()) as signalled:
            await serve(settings, broker_settings, storage_settings, webhook_settings, stop=signalled, hurry=hurry)
        return
    app = build_router(settings, broker_settings, storage_settings, webhook_settings, hurry=hurry)
    listener = bind_socket(settings.host, settings.port, setting="--port")
    host, port = listener.getsockname()[:2]
    drained = asyncio.Event()
    async with app.running(), asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(
            run_server(app, sock=listener, stop=drained, shutdown_timeout_s=2.0, limits=settings.connection_limits),
            name="http",
        )
        stopping = tasks.create_task(stop.wait(), name="stop signal")
        log.info("listening", url=f"http://{host}:{port}")
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await app.leave()
        stopping.cancel()
        await app.drain()
        drained.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Read flags, environment and ``inferq.toml``, run a Router, answer the exit code."""

    async def run() -> None:
        tables = (RouterSettings, BrokerSettings, StorageSettings, WebhookSettings, TelemetrySettings)
        own, queue, storage, webhooks, telemetry = parse_settings(
            "inferq router", "The Router: an OpenAI-compatible endpoint.", argv, *tables
        )
        with reporting("router", cast(TelemetrySettings, telemetry)):
            await serve(
                cast(RouterSettings, own),
                cast(BrokerSettings, queue),
                cast(StorageSettings, storage),
                cast(WebhookSettings, webhooks),
            )

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
