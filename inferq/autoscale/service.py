"""Run the autoscaler's process: ``inferq autoscale``."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from queue_schemas import CannotStart, InferqError
from telemetry import TelemetrySettings, get_logger
from telemetry.flags import parse_settings
from telemetry.http.app import health_app
from telemetry.http.server import bind_socket, run_beside, run_process, stop_on_signals
from telemetry.reporting import reporting

from .autoscaler import Autoscaler
from .drivers.port import Driver
from .fabric import Fabric
from .metrics import AutoscaleMetrics
from .settings import AutoscaleSettings

log = get_logger("inferq.autoscale.service")


def open_driver(settings: AutoscaleSettings) -> Driver:
    """The driver that the settings name. Raises ``CannotStart`` if it cannot work here."""
    match settings.driver:
        case "process":
            from .drivers.process import ProcessDriver  # noqa: PLC0415 - each needs its own platform

            return ProcessDriver(settings)
        case "command":
            from .drivers.command import CommandDriver  # noqa: PLC0415

            return CommandDriver(settings)
        case "ray":
            from .drivers.ray import RayDriver  # noqa: PLC0415

            return RayDriver(settings)
        case "kubernetes":
            from .drivers.kubernetes import KubernetesDriver  # noqa: PLC0415

            return KubernetesDriver(settings)


async def serve(settings: AutoscaleSettings, *, stop: asyncio.Event) -> None:
    """Scale the pool until ``stop`` is set. Raises ``CannotStart`` if the settings cannot work."""
    if not settings.pool:
        raise CannotStart("say whose workers to scale: --pool MODEL")
    metrics = AutoscaleMetrics()
    fabric = Fabric(settings.manager_urls, settings.join_token.get_secret_value())
    driver = open_driver(settings)
    autoscaler = Autoscaler(settings, fabric, driver, metrics)
    try:
        with bind_socket(settings.host, settings.port) as listener:
            host, port = listener.getsockname()[:2]
            log.info("listening", url=f"http://{host}:{port}", pool=settings.pool, driver=settings.driver)
            app = health_app("inferq autoscaler", metrics.registry, lambda: autoscaler.reasons)
            await run_beside(app, listener, lambda until: keep_scaling(settings, autoscaler, fabric, until), stop)
    finally:
        await driver.close()


async def keep_scaling(
    settings: AutoscaleSettings, autoscaler: Autoscaler, fabric: Fabric, stop: asyncio.Event
) -> None:
    """Look again and again until ``stop`` is set, then leave the pool to another autoscaler."""
    async with fabric:
        while not stop.is_set():
            await autoscaler.look()
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.interval_ms / 1000):
                    await stop.wait()
        if settings.drain_on_exit:
            try:
                await autoscaler.drain_all()
            except InferqError as error:
                log.warning("workers_not_drained", error=error.message)
        await autoscaler.give_up()


def read_settings(argv: Sequence[str] | None = None) -> tuple[AutoscaleSettings, TelemetrySettings]:
    """The settings of a command line; what follows ``--`` is the driver's. Raises ``CannotStart``."""
    given = list(sys.argv[1:] if argv is None else argv)
    options, args = given, None
    if "--" in given:
        cut = given.index("--")
        options, args = given[:cut], given[cut + 1 :]
    purpose = "Starts and drains the workers of one pool as its queue asks."
    extra = [] if args is None else [f"--args={shlex.join(args)}"]
    own, telemetry = parse_settings(
        "inferq autoscale", purpose, [*options, *extra], AutoscaleSettings, TelemetrySettings
    )
    return cast(AutoscaleSettings, own), cast(TelemetrySettings, telemetry)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the autoscaler; the process's exit code."""

    async def run() -> None:
        settings, telemetry = read_settings(argv)
        with reporting("autoscaler", telemetry), stop_on_signals() as stop:
            await serve(settings, stop=stop)

    return run_process(run)
