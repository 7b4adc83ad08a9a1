"""The autoscaler of one model's workers as a Ray actor: named, detached, started again by Ray wherever there is a node.

It is the autoscaler of `inferq autoscale` with the driver for Ray. It keeps nothing: its pool's claim lapses, and the
workers are found by their names.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import ray

from inferq.autoscale.autoscaler import Autoscaler
from inferq.autoscale.drivers.ray import RayDriver
from inferq.autoscale.drivers.worker_command import pool_name
from inferq.autoscale.fabric import Fabric
from inferq.autoscale.metrics import AutoscaleMetrics
from inferq.autoscale.service import keep_scaling
from inferq.autoscale.settings import AutoscaleSettings
from manager.ray_actor import exit_on_error
from queue_schemas import RAY_NAMESPACE
from telemetry import TelemetrySettings, configure_logging
from telemetry.ray_metrics import mirror_metrics

PREFIX = "pool:"
STOP_LIMIT_S = 10.0
_WARN_OF_BLOCKING = "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """The autoscaler's state. ``digest``: of the settings with which its caller made it. ``states``: those of the
    pool's workers, by id. ``outdated``: who is to be replaced, as it was started with other settings. ``not_scaling``:
    why it does not scale now. ``last_failure``: what the last worker said that could not be kept running."""

    settings: AutoscaleSettings
    digest: str
    states: dict[str, str]
    outdated: frozenset[str]
    not_scaling: tuple[str, ...]
    last_failure: str


class PoolActor:
    """Keeps the workers of one pool between ``min`` and ``max``."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: AutoscaleSettings, telemetry: TelemetrySettings, digest: str
    ) -> None:
        configure_logging("autoscaler", telemetry.log_level, "json")
        os.environ.setdefault(_WARN_OF_BLOCKING, "0")  # the driver calls Ray in a thread, which Ray does not see
        self._settings, self._digest = settings, digest
        self._metrics = AutoscaleMetrics()
        self._fabric = Fabric(settings.manager_urls, settings.join_token.get_secret_value())
        self._driver = RayDriver(settings, connected=True)
        self._autoscaler = Autoscaler(settings, self._fabric, self._driver, self._metrics)
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="autoscaler")
        self._task.add_done_callback(exit_on_error)

    async def facts(self) -> PoolFacts:
        """Its state now."""
        autoscaler = self._autoscaler
        return PoolFacts(
            settings=self._settings,
            digest=self._digest,
            states={worker_id: state for state, ids in autoscaler.workers.items() for worker_id in ids},
            outdated=self._driver.outdated,
            not_scaling=tuple(autoscaler.reasons),
            last_failure=self._driver.last_failure,
        )

    async def stop(self) -> None:
        """Leave the pool to another autoscaler, and its workers as they are; the actor is then to be killed."""
        self._stop.set()
        await asyncio.wait((self._task,), timeout=STOP_LIMIT_S)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            mirroring = tasks.create_task(mirror_metrics(self._metrics.registry), name="metrics")
            await keep_scaling(self._settings, self._autoscaler, self._fabric, self._stop)
            mirroring.cancel()


def make_pool(settings: AutoscaleSettings, telemetry: TelemetrySettings, digest: str) -> Any:
    """A handle to the actor of this pool, made if there is none. Blocks."""
    made: Any = ray.remote(PoolActor).options(
        name=PREFIX + pool_name(settings.pool),
        namespace=RAY_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    )
    return made.remote(settings, telemetry, digest)
