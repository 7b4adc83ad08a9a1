"""A :class:`RayCluster` for tests that watch it while it serves: nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp

from .processes import is_alive
from .ray_cluster import RayCluster
from .sockets import listeners
from .waiting import eventually

CONTROLLER, MANAGER = "ray::ServeController", "ray::ManagerActor"

_KILL_MANAGER = """
from manager.ray_actor import find_manager
ray.kill(find_manager(), no_restart=False)
"""


class RayFabric:
    """What is done to ``cluster``, and how it looks from outside. Use it as ``async with``."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.url = cluster.url
        self.port = cluster.port

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()
        if error is not None:
            print(self.cluster.logs())

    async def up(self, *flags: str) -> dict[str, Any]:
        """``inferq ray up``, which must go well; what it says."""
        return await asyncio.to_thread(self.cluster.up, *flags)

    async def down(self) -> None:
        """``inferq ray down``, which must go well and leave no process of the cluster, nor its record."""
        everything = self.cluster.processes()
        assert len(everything) > 5
        done = await asyncio.to_thread(self.cluster.inferq, "ray", "down")
        assert done.returncode == 0, done.stderr
        assert [pid for pid in everything if is_alive(pid)] == []
        assert not (self.cluster.data_dir / "ray.json").exists()

    async def leave(self) -> None:
        """``inferq ray down --address``, as who has not started the cluster: the fabric goes, the cluster stays."""
        elsewhere = ("--address", self.cluster.address, "--data-dir", str(self.cluster.folder / "elsewhere"))
        done = await asyncio.to_thread(self.cluster.inferq, "ray", "down", *elsewhere, env=self.cluster.driver_env)
        assert (done.returncode, done.stdout) == (0, "The fabric is out of Ray. The cluster runs on.\n"), done.stderr
        status = await self.status()
        assert (status["manager"], status["application"]) == (None, None)
        assert self.cluster.processes(MANAGER) == []
        assert len(self.cluster.processes()) > 5

    async def status(self) -> dict[str, Any]:
        """``inferq ray status``."""
        return await asyncio.to_thread(self.cluster.status)

    async def kill_manager_actor(self) -> None:
        """``ray.kill(actor, no_restart=False)``."""
        await asyncio.to_thread(self.cluster.ask, _KILL_MANAGER)

    async def page(self, path: str, *, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of a page of the Router; status 0 if nobody answers."""
        try:
            async with self.session.get(self.url + path, headers=headers) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 0, str(error)

    async def acting(self) -> dict[str, str] | None:
        """Sessions by worker, if the Manager in this cluster acts; else None."""
        status, page = await self.page("/fabric/v1/workers")
        if status != 200 or not page.get("manager"):
            return None
        return {worker["worker_id"]: worker["session_id"] for worker in page["workers"]}

    async def until_acting(self, workers: Mapping[str, str], limit_s: float = 60.0) -> None:
        """Wait until this cluster's Manager acts and has registered exactly these workers."""

        async def acts() -> bool:
            return await self.acting() == workers

        await eventually(acts, f"the Manager in Ray acts for {dict(workers)}", limit_s=limit_s, every_s=0.05)

    def replicas(self) -> list[int]:
        """The process ids of the replicas that listen now."""
        return [pid for pid in self.cluster.replicas() if self.port in listeners(pid)]
