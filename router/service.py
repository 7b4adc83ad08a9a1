"""The Router's process: ``python -m router.service``, the same as ``inferq router``."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Sequence
from typing import cast

from broker import BrokerSettings
from queue_schemas import CannotStart
from storage import StorageSettings
from telemetry import TelemetrySettings, configure_logging, get_logger
from telemetry.flags import parse_settings
from telemetry.http.connections.shared_accept import PauseBeforeAccept
from telemetry.http.server import bind_socket, exit_code_of, run_loop, stop_on_signals
from telemetry.reporting import reporting
from telemetry.signals import take_signals
from webhooks.settings import WebhookSettings

from .app import RouterApp, build_router
from .metrics import LOWEST_COUNTS
from .processes.connection_counts import ConnectionCounts
from .processes.sibling_link import SiblingLink
from .processes.supervisor import Supervisor
from .settings import RouterSettings

_FIRST_READY_S = 5.0
_STOP_MARGIN_S = 4.5
"""For the last errors, cancels and bytes of a process that stops."""

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
    async with app.running():
        _log_listening(listener)
        await _serve_until(stop, app, listener)


def serve_with_processes(
    settings: RouterSettings,
    broker_settings: BrokerSettings,
    storage_settings: StorageSettings,
    webhook_settings: WebhookSettings,
    telemetry_settings: TelemetrySettings,
) -> None:
    """Run ``settings.processes`` Routers on one port until SIGTERM or SIGINT; then end them in good order, as
    :func:`serve` does. For a process without threads.

    Raises ``CannotStart`` if the settings cannot work, the port is taken or a process cannot be kept running.
    """
    if not hasattr(os, "fork"):
        raise CannotStart(f"this system cannot fork processes: leave {settings.variable('processes')} at 1")
    listener = bind_socket(settings.host, settings.port, setting="--port")
    counts = ConnectionCounts(settings.processes)

    def run_child(number: int, channel: socket.socket) -> int:
        named = settings.model_copy(update={"router_id": f"{settings.router_id}-{number}"})
        siblings = SiblingLink(number, channel)

        async def run() -> None:
            stop, hurry = asyncio.Event(), asyncio.Event()
            with reporting("router", telemetry_settings):
                app = build_router(
                    named, broker_settings, storage_settings, webhook_settings, hurry=hurry, siblings=siblings
                )
                await _serve_beside(siblings, app, listener, counts.pause_of(number), stop, hurry)

        return exit_code_of(lambda: run_loop(run), siblings.refuse)

    configure_logging("router", telemetry_settings.log_level, telemetry_settings.log_format)
    take_signals()
    # What was imported is shared with the processes: their collectors need not touch, and thereby copy it.
    gc.collect()
    gc.freeze()
    _log_listening(listener, processes=settings.processes)
    stop_limit_s = (settings.lame_duck_ms + settings.shutdown_timeout_ms) / 1000 + _STOP_MARGIN_S
    Supervisor(
        settings.processes, listener, run_child, counts.gone, stop_limit_s=stop_limit_s, lowest=LOWEST_COUNTS
    ).run()


async def _serve_beside(
    siblings: SiblingLink,
    app: RouterApp,
    listener: socket.socket,
    pause: PauseBeforeAccept,
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> None:
    """Run one of several Routers that accept from ``listener``, until their parent says to stop."""
    await siblings.open()
    async with asyncio.TaskGroup() as tasks:
        orders = tasks.create_task(siblings.run(app.services.metrics.registry, stop, hurry), name="orders")
        async with app.running():
            # The others take the connections until this one can serve them.
            await app.ready_within(_FIRST_READY_S, or_until=stop)
            siblings.ready()
            await _serve_until(stop, app, listener, pause)
        orders.cancel()


async def _serve_until(
    stop: asyncio.Event, app: RouterApp, listener: socket.socket, pause: PauseBeforeAccept | None = None
) -> None:
    """Serve until ``stop`` is set, then leave and drain."""
    drained = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(
            app.listen(listener, stop=drained, shutdown_timeout_s=2.0, pause_before_accept=pause), name="http"
        )
        stopping = tasks.create_task(stop.wait(), name="stop signal")
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await app.leave()
        stopping.cancel()
        await app.drain()
        drained.set()


def _log_listening(listener: socket.socket, **facts: int) -> None:
    host, port = listener.getsockname()[:2]
    log.info("listening", url=f"http://{host}:{port}", **facts)


def main(argv: Sequence[str] | None = None) -> int:
    """Read flags, environment and ``inferq.toml``, run a Router, answer the exit code."""
    tables = (RouterSettings, BrokerSettings, StorageSettings, WebhookSettings, TelemetrySettings)

    def run() -> None:
        parsed = parse_settings("inferq router", "The Router: an OpenAI-compatible endpoint.", argv, *tables)
        own, queue, storage, webhooks = cast(
            tuple[RouterSettings, BrokerSettings, StorageSettings, WebhookSettings], parsed[:4]
        )
        telemetry = cast(TelemetrySettings, parsed[4])
        if own.processes > 1:
            serve_with_processes(own, queue, storage, webhooks, telemetry)
            return

        async def run_one() -> None:
            with reporting("router", telemetry):
                await serve(own, queue, storage, webhooks)

        take_signals()
        run_loop(run_one)

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
