"""Start the fleet of a run on loopback: Redis, two Routers, two Managers, four Workers with engines of their own.

Two Workers are at Redis, one of ours and one in Go have the queue over HTTP. A proxy stands before Redis for each who
reaches it, and before every Router and Manager for each Worker.

One worker's and the standby's clock is an hour ahead, one Router's an hour behind, all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from redis.exceptions import RedisError

from queue_schemas.keys import ShardKeys
from tests.support.clocks import HOUR_S, clock_off_by
from tests.support.example_worker import ExampleWorker, build_go_worker
from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.queue import record_of
from tests.support.servers import Server

from .answers import DIMENSIONS
from .clients import Clients
from .explanations import MAX_ATTEMPTS
from .history import History
from .plan import ALL_WORKERS, EXAMPLE_WORKER, LEASE_S, MANAGERS, REDIS_WORKERS, ROUTERS, SWEEP_S, WORKERS, Fault
from .workload import TENANTS

SLOTS = 8
RECOVERY_LIMIT_S = 20.0
HELD_LIMIT_S = 3.0
FENCED, DUPLICATE = b"$6\r\nfenced\r\n", b"$9\r\nduplicate\r\n"
"""The queue's replies, on the wire."""
_LAG_S = 0.02
_KEYS = ShardKeys(0)


class ChaosFleet:
    """The processes of a run, made by :func:`started_fleet`."""

    def __init__(self, base: Fleet, server: Server, history: History) -> None:
        self.base = base
        self.server = server
        self.history = history
        self.routers: list[Role] = [base.router]
        self.managers: list[Role] = [base.manager]
        self.worker_links: list[FaultProxy] = []
        self.router_links: list[FaultProxy] = []
        self.fabric_links: list[list[FaultProxy]] = []
        """For each worker, one proxy before each Router and Manager."""
        self.examples: list[ExampleWorker] = []
        self.clients: Clients | None = None
        self.in_use: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By process name: held by the fault that kills or pauses it."""
        self._measurements: list[asyncio.Task[None]] = []
        self._stalls: list[tuple[float, float]] = []

    @property
    def workers(self) -> list[Role]:
        return self.base.workers

    @property
    def all_workers(self) -> list[Role | ExampleWorker]:
        """Those of another make, too."""
        return [*self.workers, *self.examples]

    @property
    def roles(self) -> list[Role]:
        """All processes of the product."""
        return [*self.managers, *self.routers, *self.workers]

    async def watch_stalls(self) -> None:
        """Record, until cancelled, when this process itself was stalled because the machine was busy."""
        while True:
            asked = time.monotonic()
            await asyncio.sleep(_LAG_S)
            late = time.monotonic() - asked - _LAG_S
            if late > _LAG_S:
                self._stalls.append((asked, late))

    def measure_recovery(self, how: str, number: int, held: dict[str, int]) -> None:
        """Measure from now until the next attempt of any job in ``held`` (id -> epoch) begins."""
        if held:
            at_s = self.history.now_s
            self._measurements.append(asyncio.create_task(self._until_next_start(how, number, held, at_s)))

    async def held_by(self, worker: Role | ExampleWorker) -> dict[str, int]:
        """Job id -> epoch of a worker's leases; waits a moment until it has some."""
        limit = time.monotonic() + HELD_LIMIT_S
        async with self.server.client(socket_timeout=2) as client:
            while time.monotonic() < limit:
                with contextlib.suppress(OSError, RedisError):
                    held: dict[str, int] = {}
                    for key in await client.keys(_KEYS.prefix.replace("{", "[{]") + f"leases:{worker.name}.*"):
                        held |= {k.decode(): int(v.split()[0]) for k, v in (await client.hgetall(key)).items()}
                    if held:
                        return held
                await asyncio.sleep(0.01)
        return {}

    async def _until_next_start(self, how: str, number: int, held: dict[str, int], at_s: float) -> None:
        begun = time.monotonic()
        async with self.server.client(socket_timeout=2) as client:
            while time.monotonic() - begun < RECOVERY_LIMIT_S:
                with contextlib.suppress(OSError, RedisError):
                    for job_id, epoch in held.items():
                        record = await record_of(client, _KEYS.job(job_id))
                        if record and record["state"] == "leased" and int(record["epoch"]) > epoch:
                            seconds = time.monotonic() - begun
                            stalled_s = max((late for at, late in self._stalls if at >= begun), default=0.0)
                            self.history.add(
                                "recovery", t=at_s, how=how, fault=number, seconds=seconds, stalled_s=stalled_s
                            )
                            return
                await asyncio.sleep(0.01)

    async def finish_measurements(self) -> None:
        """Wait until the running measurements end."""
        await asyncio.gather(*self._measurements)


FaultAction = Callable[[ChaosFleet, int, Fault], Awaitable[None]]
"""Injects one fault (its number, itself) into the fleet, and heals it."""


@asynccontextmanager
async def started_fleet(folder: Path, server: Server, history: History) -> AsyncIterator[ChaosFleet]:
    """Start all roles and wait until they serve; stop them with the block."""
    keys = ",".join(f"{hashlib.sha256(tenant.encode()).hexdigest()}:{tenant}" for tenant in TENANTS)
    credentials = folder / "workers.toml"
    credentials.write_text("".join(f'[worker-{n}]\nsha256 = ["{_digest(n)}"]\n' for n in range(1, ALL_WORKERS + 1)))
    router = {"api_keys": keys, "max_attempts": MAX_ATTEMPTS, "max_body_bytes": 4 << 20}
    router["worker_credentials_file"] = str(credentials)
    manager = {"lease_ms": int(LEASE_S * 1000), "sweep_interval_ms": int(SWEEP_S * 1000)}
    ahead, behind = clock_off_by(HOUR_S, folder), clock_off_by(-HOUR_S, folder)
    async with AsyncExitStack() as exits:

        async def link_to(port: int) -> FaultProxy:
            return await exits.enter_async_context(FaultProxy(port))

        router_links = [await link_to(server.port) for _ in range(ROUTERS)]
        first = router | {"redis_url": router_links[0].url, "processes": 2}
        base = await exits.enter_async_context(Fleet(folder, server, manager=manager, router=first))
        fleet = ChaosFleet(base, server, history)
        fleet.router_links = router_links
        with base.having(ahead):
            fleet.managers += [base.another_manager(f"manager-{number + 1}") for number in range(1, MANAGERS)]
        for number in range(1, ROUTERS):
            own = {"redis_url": router_links[number].url, "manager_url": fleet.managers[number % MANAGERS].url}
            with base.having(behind):
                fleet.routers.append(base.another_router(f"router-{number + 1}", **router, **own))
        for number in range(WORKERS):
            if number < REDIS_WORKERS:
                fleet.worker_links.append(await link_to(server.port))
            fleet.fabric_links.append([await link_to(role.port) for role in (*fleet.routers, *fleet.managers)])
            with base.having(ahead if number == WORKERS - 1 else {}):
                _add_worker(fleet, number)
        fleet.fabric_links.append([await link_to(role.port) for role in fleet.routers])
        _add_example(fleet, folder)
        for link in (*fleet.router_links, *fleet.worker_links):
            link.watch_for = (FENCED, DUPLICATE)
        base.session.headers["authorization"] = f"Bearer {TENANTS[0]}"
        for role in fleet.roles:
            role.process.start()
        for example in fleet.examples:
            exits.callback(example.kill)
            example.engine.start()
            example.process.start()
        await asyncio.gather(*(up(role) for role in fleet.roles))
        await base.until_served(ALL_WORKERS)
        stalls = asyncio.create_task(fleet.watch_stalls(), name="stalls")
        try:
            yield fleet
        finally:
            stalls.cancel()


_ENGINE = {"tokens_per_s": 40, "ttft_ms": 20, "embedding_dimensions": DIMENSIONS}


def _add_worker(fleet: ChaosFleet, number: int) -> None:
    links = fleet.fabric_links[number]
    if number < REDIS_WORKERS:
        transport: dict[str, object] = {"redis_url": fleet.worker_links[number].url}
    else:
        links = links[: len(fleet.routers)]
        transport = {"key": _key(number + 1)}
    urls = ",".join(f"http://127.0.0.1:{link.port}" for link in links)
    engine = {f"sim_{name}": value for name, value in _ENGINE.items()}
    fleet.base.worker(
        f"worker-{number + 1}", engine="sim-process", slots=SLOTS, manager_url=urls, drain_timeout_ms=2_000,
        **engine, **transport,
    )  # fmt: skip


def _add_example(fleet: ChaosFleet, folder: Path) -> None:
    """The worker in Go, as the last one."""
    name, port = EXAMPLE_WORKER, fleet.base.ports.take()
    options: list[object] = ["--host", "127.0.0.1", "--port", port, "--model", MODEL, "--mode", "echo", "--name", name]
    for option, value in _ENGINE.items():
        options += [f"--{option.replace('_', '-')}", value]
    env = {
        "ROUTER_URL": ",".join(f"http://127.0.0.1:{link.port}" for link in fleet.fabric_links[-1]),
        "ENGINE_URL": f"http://127.0.0.1:{port}",
        "WORKER_KEY": _key(ALL_WORKERS),
        "WORKER_ID": name,
        "WORKER_SLOTS": str(SLOTS),
    }
    fleet.examples.append(ExampleWorker(folder, name, [str(build_go_worker(folder))], options, env))


def _key(number: int) -> str:
    return f"the key of worker {number}"


def _digest(number: int) -> str:
    return hashlib.sha256(_key(number).encode()).hexdigest()


async def up(role: Role | ExampleWorker) -> None:
    """Wait until a role serves; a Manager that stands by is alive, not ready."""
    await role.ready("/healthz" if role.name.startswith("manager") else "/readyz")
