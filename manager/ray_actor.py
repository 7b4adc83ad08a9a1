"""Run the Manager as a Ray actor: named, detached, started again by Ray whenever it dies.

It answers what the Manager's HTTP API answers, with the same app: a Router hands it a worker's call as it came
(:meth:`ManagerActor.answer`). ``python -m manager.ray_actor`` makes sure that there is one in a running cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray

from broker import BrokerSettings
from broker.redis.link import open_link
from queue_schemas import RAY_MANAGER, RAY_NAMESPACE, BrokerUnsuitable, CannotStart
from queue_schemas.fleet.acting_manager import RAY_SCHEME
from telemetry import TelemetrySettings, configure_logging, configure_tracing, get_logger
from telemetry.backoff import Backoff
from telemetry.flags import parse_settings
from telemetry.http.app import call_app
from telemetry.ray_metrics import mirror_metrics

from .control_plane import ManagerService
from .probe import HttpWorkerProbe
from .routes import create_app
from .service import open_broker
from .settings import ManagerSettings

CALL_CONCURRENCY = 1_000
CALL_RETRIES = 3
"""How often Ray repeats a call whose actor died under it, once the actor is there again."""
_BACKOFF = Backoff(1.0, 30.0)
STOP_TIMEOUT_S = 10.0

log = get_logger("manager.ray_actor")


@dataclass(frozen=True, slots=True)
class ActorFacts:
    """The actor's state. ``digest``: of the settings with which its caller made it."""

    digest: str
    pid: int
    acting: bool
    not_ready: list[str]


class ManagerActor:
    """One Manager. All its state is in Redis and the next heartbeats, so a restart needs nothing kept."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: ManagerSettings, broker_settings: BrokerSettings, telemetry: TelemetrySettings, digest: str
    ) -> None:
        configure_logging("manager", telemetry.log_level, "json")
        configure_tracing("manager", telemetry.otlp_endpoint)
        self._digest = digest
        self._probe = HttpWorkerProbe(settings.probe_timeout_s)
        self._service = ManagerService(
            settings,
            open_broker(broker_settings),
            self._probe,
            broker_url=broker_settings.redis_url,
            url=settings.advertise_url or f"{RAY_SCHEME}{RAY_MANAGER}",
        )
        self._app = create_app(self._service)
        self._stop = asyncio.Event()
        self._unfit = ""
        self._task = asyncio.create_task(self._run(), name="manager")
        self._task.add_done_callback(exit_on_error)

    async def answer(
        self, method: str, path: str, query: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """One call of the HTTP API: status, headers and body of its answer."""
        return await call_app(self._app, method, path, query, headers, body)

    async def facts(self) -> ActorFacts:
        """Its state now."""
        reasons = [self._unfit] if self._unfit else self._service.not_ready()
        return ActorFacts(self._digest, os.getpid(), self._service.acting, reasons)

    async def stop(self) -> None:
        """Hand the acting lease back and end all work; the actor itself is then to be killed."""
        self._stop.set()
        await asyncio.wait((self._task,), timeout=STOP_TIMEOUT_S)

    async def _run(self) -> None:
        async with self._probe, asyncio.TaskGroup() as tasks:
            service = self._service
            mirror = mirror_metrics(service.metrics.registry, service.show_metrics)
            mirroring = tasks.create_task(mirror, name="metrics")
            await self._serve()
            mirroring.cancel()

    async def _serve(self) -> None:
        failures = 0
        while not self._stop.is_set():
            self._unfit = ""
            try:
                await self._service.run(self._stop)
            except* BrokerUnsuitable as unfit:
                # A process would end with this sentence; here Ray would only start the actor again, at once.
                self._unfit = str(unfit.exceptions[0])
                failures += 1
                pause = _BACKOFF.pause_s(failures)
                log.error("broker_unsuitable", error=self._unfit, again_in_s=pause)
                await self._stopped_within(pause)

    async def _stopped_within(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._stop.wait()


def exit_on_error(task: asyncio.Task[None]) -> None:
    """End the process after an unforeseen error: Ray starts another."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("actor_broken", error=repr(error), exc_info=error)
        os._exit(1)


def find_manager() -> Any | None:
    """A handle to the cluster's Manager; None if it has none. Blocks."""
    try:
        return ray.get_actor(RAY_MANAGER, RAY_NAMESPACE)
    except ValueError:
        return None


def ensure_manager(
    settings: ManagerSettings, broker_settings: BrokerSettings, telemetry: TelemetrySettings, digest: str = ""
) -> Any:
    """A handle to the cluster's Manager, made with these settings if there is none. Blocks.

    Raises ``CannotStart`` if the settings cannot work. Redis need not be there.
    """
    if not broker_settings.redis_url:
        raise CannotStart("in a Ray cluster the Manager must be told where Redis is: give --redis-url")
    open_link(broker_settings)  # connects to nothing: it only reads the URL
    made = ray.remote(ManagerActor).options(
        name=RAY_MANAGER,
        namespace=RAY_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=CALL_RETRIES,
        max_concurrency=CALL_CONCURRENCY,
    )
    return made.remote(settings, broker_settings, telemetry, digest)


def remove_manager(timeout_s: float = 2 * STOP_TIMEOUT_S) -> bool:
    """End the cluster's Manager in good order; False if there was none. Blocks."""
    actor = find_manager()
    if actor is None:
        return False
    try:
        ray.get(actor.stop.remote(), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        log.warning("manager_not_stopped", error=str(error), then="its acting lease runs out by itself")
    ray.kill(actor, no_restart=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Make sure that the Ray cluster which ``RAY_ADDRESS`` names, or which runs here, has a Manager."""
    from telemetry.http.server import run_process  # noqa: PLC0415

    async def run() -> None:
        tables = (ManagerSettings, BrokerSettings, TelemetrySettings)
        own, queue, reporting = parse_settings(
            "python -m manager.ray_actor", "The Manager in a Ray cluster.", argv, *tables
        )
        configure_logging("manager", "warning", "auto")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address="auto", namespace=RAY_NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise CannotStart("no Ray cluster runs here: start one (`ray start --head`), or set RAY_ADDRESS") from error
        actor = ensure_manager(
            cast(ManagerSettings, own), cast(BrokerSettings, queue), cast(TelemetrySettings, reporting)
        )
        facts = await actor.facts.remote()
        sys.stdout.write(f"the Manager runs in Ray as process {facts.pid}\n")

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
