"""A whole fleet of real processes on loopback: Manager, Router, workers with simulated engines, each with its log.

Times are short, so that what takes seconds in production takes a fraction of one here. Everything ends with the block::

    async with Fleet(tmp_path, server) as fleet:
        await fleet.up(workers=2)
        fleet.workers[0].process.kill()
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from telemetry.environment import HeldPorts

from .processes import Child, environment
from .servers import Server
from .waiting import eventually

ROOT = Path(__file__).parents[2]
READY_LIMIT_S = 30.0
MODEL = "sim"

_OVER_HTTP = os.environ.get("INFERQ_TESTS_TRANSPORT") == "http"
"""Whether all workers have the queue over HTTP, each with a key: to run the tests of fleets so, by hand."""

_MANAGER = {
    "lease_ms": 3_000,
    "heartbeat_interval_ms": 300,
    "unresponsive_after_ms": 1_000,
    "leader_lease_ms": 1_500,
    "sweep_interval_ms": 200,
}
_ROUTER = {"directory_interval_ms": 100, "sweep_interval_ms": 50, "deadline_grace_ms": 1_000}
_WORKER = {"engine": "sim", "sim_mode": "echo", "sim_ttft_ms": 5, "sim_tokens_per_s": 400}
"""Settings of each role in tests, as flags; a test may give others."""


class Role:
    """One role's process and its pages."""

    def __init__(
        self, fleet: Fleet, name: str, module: str, flags: Mapping[str, object], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.port = fleet.ports.take()
        self.url = f"http://127.0.0.1:{self.port}"
        self._fleet = fleet
        args = [sys.executable, "-m", module, "--port", str(self.port)]
        for flag, value in flags.items():
            args += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
        clean = environment()
        clean |= {"PYTHONPATH": str(ROOT), "INFERQ_LOG_FORMAT": "json", **env}
        # Not in the repository's root: the settings file and the data there are somebody's own.
        log = fleet.folder / f"{name}.log"
        self.process = Child(name, args, log, env=clean, cwd=fleet.folder, preloaded=True)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a page; status 0 if nobody answers."""
        try:
            async with self._fleet.session.get(self.url + path) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0, b""

    async def page(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """A JSON page that must be there."""
        async with self._fleet.session.get(self.url + path, headers=headers) as answer:
            assert answer.status == 200, f"{self.name}{path}: {answer.status} {await answer.text()}"
            return await answer.json()

    async def metrics(self) -> str:
        """The Prometheus page."""
        status, body = await self.get("/metrics")
        assert status == 200
        return body.decode()

    async def ready(self, page: str = "/readyz") -> Self:
        """Wait until ``page`` answers 200: that it is ready, or (``/healthz``) alive; fails with the log's tail."""

        async def is_ready() -> bool:
            assert self.process.running, f"{self.name} ended with {self.process.returncode}\n{self.process.log_tail()}"
            return (await self.get(page))[0] == 200

        try:
            await eventually(is_ready, f"{self.name} is ready", limit_s=READY_LIMIT_S, every_s=0.03)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.log_tail()}") from None
        return self

    async def start(self) -> Self:
        """Start it and wait until it is ready."""
        self.process.start()
        return await self.ready()

    async def restart(self) -> Self:
        """kill -9 and start again on the same port."""
        self.process.kill()
        return await self.start()

    async def ended(self, limit_s: float = 20.0) -> int:
        """Its exit code, waited for without blocking the loop."""
        await eventually(lambda: not self.process.running, f"{self.name} ends", limit_s=limit_s)
        code = self.process.returncode
        assert code is not None
        return code


class Fleet:
    """The processes of one test. ``manager`` and ``router`` exist at once, started by :meth:`up` or one by one."""

    def __init__(
        self,
        folder: Path,
        server: Server,
        *,
        manager: Mapping[str, object] | None = None,
        router: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.server = server
        self.workers: list[Role] = []
        self.ports = HeldPorts()
        self._env = dict(env or {})
        self._everything: list[Role] = []
        self._credentials = folder / "workers.toml"
        self._credentials.touch()
        self._manager_flags = _MANAGER | {"redis_url": server.url} | dict(manager or {})
        self._router_flags = dict(router or {})

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(limit=0)
        )
        self.manager = self.add("manager", "manager.service", self._manager_flags)
        self.router = self.another_router("router", **self._router_flags)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()
        for role in self._everything:
            role.process.kill_group()
        self.ports.close()
        if error is not None:
            for role in self._everything:
                print(role.process.log_tail(15))

    async def up(self, workers: int = 1, **flags: object) -> Self:
        """Start Manager, Router and ``workers`` workers at once, and wait until the Router serves their model."""
        roles = [
            self.manager,
            self.router,
            *(self.worker(f"worker-{number + 1}", **flags) for number in range(workers)),
        ]
        for role in roles:
            role.process.start()
        await asyncio.gather(*(role.ready() for role in roles))
        await self.until_served(workers)
        return self

    def another_router(self, name: str, **flags: object) -> Role:
        """A Router, not started yet."""
        settings = _ROUTER | {"router_id": name, "manager_url": self.manager.url}
        if _OVER_HTTP:
            settings |= {"worker_credentials_file": self._credentials}
        return self.add(name, "router.service", settings | flags)

    def another_manager(self, name: str) -> Role:
        """A Manager that stands by, not started yet."""
        return self.add(name, "manager.service", self._manager_flags)

    def worker(self, name: str, **flags: object) -> Role:
        """A worker, not started yet; it registers through the Router, as users do, or with the Manager."""
        urls = f"{self.router.url},{self.manager.url}"
        settings = _WORKER | {"worker_id": name, "manager_url": urls, "model": MODEL, "sim_name": name} | flags
        if _OVER_HTTP and not {"redis_url", "key"} & flags.keys():
            settings |= {"key": f"key of {name}", "manager_url": flags.get("manager_url", self.router.url)}
            with self._credentials.open("a") as file:
                file.write(f'["{name}"]\nsha256 = ["{_digest_of(name)}"]\n')
        self.workers.append(self.add(name, "worker.service", settings))
        return self.workers[-1]

    async def until_served(self, workers: int, model: str = MODEL) -> None:
        """Wait until the Router counts so many workers for a model."""

        async def served() -> bool:
            status, _ = await self.router.get(f"/v1/models/{model}")
            pools = (await self.router.page("/fabric/v1/pools"))["pools"]
            return status == 200 and any(pool["model"] == model and pool["workers"] == workers for pool in pools)

        await eventually(served, f"{workers} workers serve {model}", limit_s=READY_LIMIT_S, every_s=0.05)

    async def depth(self, model: str = MODEL) -> dict[str, Any]:
        """The queue of one model, as the Router shows it."""
        found: dict[str, Any] = await self.router.page(f"/fabric/v1/pools/{model}")
        return found

    @contextmanager
    def having(self, env: Mapping[str, str]) -> Iterator[None]:
        """Roles that are made within have more in their environment."""
        before = self._env
        self._env = before | dict(env)
        try:
            yield
        finally:
            self._env = before

    def add(self, name: str, module: str, flags: Mapping[str, object]) -> Role:
        """A role by its module, not started yet; it ends with the fleet."""
        role = Role(self, name, module, flags, self._env)
        self._everything.append(role)
        return role


def _digest_of(name: str) -> str:
    return hashlib.sha256(f"key of {name}".encode()).hexdigest()
