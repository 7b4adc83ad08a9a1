"""Workers in a Ray cluster: each a detached actor that keeps one ``inferq worker`` process running on its node."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from inferq.ray_cluster.cluster import connected, find_target, require_ray
from inferq.ray_cluster.settings import RaySettings
from queue_schemas import CannotStart, InferqError
from telemetry import get_logger
from telemetry.threads import in_thread

from ..settings import AutoscaleSettings
from .port import DriverFailed
from .start_pauses import StartPauses
from .worker_command import id_prefix, join_token, worker_args, worker_mark

if TYPE_CHECKING:
    from inferq.ray_cluster.workers import RayWorkers

_Result = TypeVar("_Result")

log = get_logger(__name__)


class RayDriver:
    """Asks the cluster of table ``[ray]`` for workers. Ray places them, and places them anew where a node is lost.

    They are detached: they outlive the autoscaler, and the next one finds them by their names. The ids have a mark of
    the settings with which they were started.
    """

    drains = False

    def __init__(self, settings: AutoscaleSettings, *, connected: bool = False) -> None:
        """``connected``: this process is one of the cluster's. Otherwise the first step makes it one, of table
        ``[ray]``. Raises ``CannotStart`` without Ray."""
        require_ray()
        self._settings = settings
        self._connected = connected
        self._prefix = id_prefix(settings.pool, "ray")
        self._current = f"{self._prefix}-{worker_mark(settings)}-"
        self.outdated: frozenset[str] = frozenset()
        self.last_failure = ""
        """What the last worker said that could not be kept running."""
        self._start = secrets.token_hex(2)
        self._count = 0
        self._exits = ExitStack()
        self._workers: RayWorkers | None = None
        self._one_step = asyncio.Lock()
        self._pauses = StartPauses()
        self._kill_at: dict[str, float] = {}

    async def workers(self) -> frozenset[str]:
        found = await self._call(lambda workers: workers.find())
        for failure in found.failures:
            self._pauses.failed(time.monotonic(), 0.0, failure)
            self.last_failure = failure
        self.outdated = frozenset(one for one in found.running if not one.startswith(self._current))
        self._kill_at = {one: at for one, at in self._kill_at.items() if one in found.running}
        for worker_id in [one for one, at in self._kill_at.items() if time.monotonic() >= at]:
            log.warning("worker_killed", worker=worker_id, after_ms=self._settings.stop_timeout)
            await self._stop(worker_id, kill=True)
        return found.running

    async def scale_to(self, count: int) -> None:
        missing = count - len(await self.workers())
        if missing > 0:
            self._pauses.check(time.monotonic())
        for _ in range(missing):
            self._count += 1
            await self._ask_for(f"{self._current}{self._start}-{self._count}")

    async def remove(self, worker_ids: Sequence[str]) -> None:
        for worker_id in worker_ids:
            self._kill_at.setdefault(worker_id, time.monotonic() + self._settings.stop_timeout / 1000)
            await self._stop(worker_id, kill=False)

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        return ordered[:count]

    async def close(self) -> None:
        await in_thread(self._exits.close)

    async def _ask_for(self, worker_id: str) -> None:
        args, environment = worker_args(self._settings, worker_id), join_token(self._settings)
        await self._call(lambda workers: workers.start(worker_id, args, environment))
        log.info("worker_started", worker=worker_id)

    async def _stop(self, worker_id: str, *, kill: bool) -> None:
        await self._call(lambda workers: workers.stop(worker_id, kill=kill))

    async def _call(self, work: Callable[[RayWorkers], _Result]) -> _Result:
        """What ``work`` answers in a thread, one at a time. Raises ``DriverFailed``; the next call connects anew."""

        def run() -> _Result:
            if self._workers is None:
                self._workers = self._connect()
            return work(self._workers)

        async with self._one_step:
            try:
                return await in_thread(run)
            except InferqError as error:
                raise DriverFailed(error.message) from error
            except Exception as error:  # Ray has errors of many kinds
                self._workers = None
                await in_thread(self._exits.close)
                said = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise DriverFailed(f"the Ray cluster does not do as it is asked: {said}") from error

    def _connect(self) -> RayWorkers:
        if not self._connected:
            ray = RaySettings.load(data_dir=self._settings.data_dir)
            target = find_target(ray)
            if target is None:
                raise CannotStart(
                    "no Ray cluster of ours runs: start it with `inferq ray up`, or set INFERQ_RAY_ADDRESS"
                )
            self._exits.enter_context(connected(target, ray.connect_limit_ms / 1000))
        from inferq.ray_cluster.workers import RayWorkers  # noqa: PLC0415 - loads Ray, once its variables are set

        own = self._settings
        return RayWorkers(self._prefix, cpus=own.ray_cpus, gpus=own.ray_gpus)
