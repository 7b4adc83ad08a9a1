"""The fleet of a run, on loopback: Redis, two Routers, Manager and standby, three Workers with engines of their own, a
proxy before Redis for each Router and Worker; and the faults that are done to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from broker.scripts import load_scripts
from queue_schemas.keys import ShardKeys
from tests.support.faults import FaultProxy, Strike
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

from .clients import TENANTS, Clients
from .history import History
from .plan import MANAGERS, ROUTERS, WORKERS, Fault, Kind

SLOTS = 6
RECOVERY_LIMIT_S = 20.0
QUIET_LIMIT_S = 75.0
"""Longer than the 60 s after which a killed Router counts as gone: so long its lost streams wait for it."""
BURSTS = {"hurried": 500, "malformed": 30}
"""Requests at once, by kind."""
_SHA = {name: script.sha.encode() for name, script in load_scripts(flags=True).items()}
_KEYS = ShardKeys(0)


def _marker(call: str) -> bytes:
    """What a request of an operation has in it, on the wire."""
    return b"NOMKSTREAM\r\n$1\r\n*\r\n$1\r\nf\r\n" if call == "publish" else _SHA[call]


class Stage:
    """The processes. Made with :func:`staged`."""

    def __init__(self, fleet: Fleet, server: Server, history: History) -> None:
        self.fleet = fleet
        self.server = server
        self.history = history
        self.routers: list[Role] = [fleet.router]
        self.managers: list[Role] = [fleet.manager]
        self.worker_links: list[FaultProxy] = []
        self.router_links: list[FaultProxy] = []
        self.clients: Clients | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._under_way: set[int] = set()

    @property
    def workers(self) -> list[Role]:
        return self.fleet.workers

    async def do(self, number: int, fault: Fault) -> None:
        """Execute one fault and heal it."""
        self.history.add("fault", number=number, kind=fault.kind, target=fault.target, told=str(fault))
        self._under_way.add(number)
        await _DEEDS[fault.kind](self, fault)
        self._under_way.discard(number)
        self.history.add("healed", number=number)

    async def quiet(self) -> None:
        """Everything is up again and nothing waits or runs; what is left over goes into the history."""
        with contextlib.suppress(AssertionError):
            await eventually(self._is_empty, "the queue is empty", limit_s=QUIET_LIMIT_S, every_s=0.1)
        left = {name: value for name, value in self._left().items() if value}
        self.history.add("final", left=left)

    async def _is_empty(self) -> bool:
        return not any(self._left().values())

    def _left(self) -> dict[str, Any]:
        ask = self.server.ask
        budget = {k.decode(): int(v) for k, v in ask("HGETALL", _KEYS.budget).items() if int(v)}
        depth = {k.decode(): int(v) for k, v in ask("HGETALL", _KEYS.depth).items() if int(v)}
        waiting = [key.decode() for pattern in ("q:*", "retry:*", "suspects:*") for key in self._keys(pattern)]
        leases = [key.decode() for key in self._keys("leases:*")]
        return {
            "budget": budget,
            "depth": depth,
            "queues": waiting,
            "leases": leases,
            "deadlines": int(ask("ZCARD", _KEYS.deadlines)),
            "lost": int(ask("ZCARD", _KEYS.lost)),
        }

    def _keys(self, pattern: str) -> list[bytes]:
        return list(self.server.ask("KEYS", _KEYS.prefix.replace("{", "[{]") + pattern))

    def counts(self) -> dict[str, int]:
        """What the roles said and the queue counted, over the whole run."""
        counts = dict.fromkeys(("fenced", "duplicate", "declared dead", "streams continued", "jobs crashed"), 0)
        for role in (*self.workers, *self.routers):
            for line in role.process.log_text().splitlines():
                _count(line, counts)
        totals = {k.decode(): int(v) for k, v in self.server.ask("HGETALL", _KEYS.totals).items()}
        for event in ("requeued", "lost", "enqueued", "done", "failed", "cancelled", "expired", "dead"):
            counts[event] = sum(n for name, n in totals.items() if name.endswith(f":{event}"))
        counts["recovered"] = counts["requeued"] + counts["lost"]
        return counts

    def watch_recovery(self, how: str, worker: Role) -> None:
        """Measure from now until the next attempt of any job that ``worker`` holds begins elsewhere."""
        held: dict[str, int] = {}
        with contextlib.suppress(OSError, RedisError):
            held = self._held_by(worker)
        if held:
            beside = len(self._under_way) - 1
            self._watches.append(asyncio.create_task(self._until_next_start(how, beside, held, time.monotonic())))

    def _held_by(self, worker: Role) -> dict[str, int]:
        """Job id -> epoch of what a worker holds."""
        held: dict[str, int] = {}
        for key in self._keys(f"leases:{worker.name}.*"):
            held |= {k.decode(): int(v) for k, v in self.server.ask("HGETALL", key.decode()).items()}
        return held

    async def _until_next_start(self, how: str, beside: int, held: dict[str, int], begun: float) -> None:
        async with self.server.client() as client:
            while time.monotonic() - begun < RECOVERY_LIMIT_S:
                with contextlib.suppress(OSError, RedisError):
                    for job_id, epoch in held.items():
                        state, now = await client.hmget(_KEYS.job(job_id), "state", "epoch")
                        if state == b"leased" and int(now) > epoch:
                            self.history.add("recovery", how=how, beside=beside, seconds=time.monotonic() - begun)
                            return
                await asyncio.sleep(0.01)

    async def watched(self) -> None:
        """Wait for what is still measured."""
        await asyncio.gather(*self._watches)


def _count(line: str, counts: dict[str, int]) -> None:
    try:
        said = json.loads(line)
    except ValueError:
        return
    event, answer = said.get("event"), said.get("answer")
    if event in ("answer_dropped", "job_released", "job_crashed") and answer in ("fenced", "duplicate"):
        counts[answer] += 1
    elif event == "declared_dead":
        counts["declared dead"] += 1
        counts["fenced"] += 1
    elif event == "stream_resumed" and said.get("delivered"):
        counts["streams continued"] += 1
    if event == "job_crashed":
        counts["jobs crashed"] += 1


@asynccontextmanager
async def staged(folder: Path, server: Server, history: History) -> AsyncIterator[Stage]:
    """All roles started, serving; ended with the block."""
    keys = ",".join(f"{hashlib.sha256(tenant.encode()).hexdigest()}:{tenant}" for tenant in TENANTS)
    # Attempts enough that only poison can use them up.
    router = {"api_keys": keys, "max_attempts": 12, "max_body_bytes": 4 << 20}
    async with AsyncExitStack() as exits:
        links = [await exits.enter_async_context(FaultProxy(server.port)) for _ in range(ROUTERS + WORKERS)]
        first = links[0]
        fleet = await exits.enter_async_context(Fleet(folder, server, router=router | {"redis_url": first.url}))
        stage = Stage(fleet, server, history)
        stage.router_links, stage.worker_links = links[:ROUTERS], links[ROUTERS:]
        for number in range(1, MANAGERS):
            stage.managers.append(fleet.another_manager(f"manager-{number + 1}"))
        for number in range(1, ROUTERS):
            own = {"redis_url": links[number].url, "manager_url": stage.managers[number % MANAGERS].url}
            stage.routers.append(fleet.another_router(f"router-{number + 1}", **router, **own))
        urls = ",".join(role.url for role in (*stage.routers, *stage.managers))
        for number, link in enumerate(stage.worker_links):
            fleet.worker(
                f"worker-{number + 1}", engine="sim-process", slots=SLOTS, manager_url=urls, redis_url=link.url,
                sim_tokens_per_s=40, sim_ttft_ms=20, drain_limit_ms=2_000,
            )  # fmt: skip
        fleet.session.headers["authorization"] = f"Bearer {TENANTS[0]}"
        roles = [*stage.managers, *stage.routers, *stage.workers]
        for role in roles:
            role.process.start()
        await asyncio.gather(*(_up(role) for role in roles))
        await fleet.until_served(WORKERS)
        yield stage


Deed = Callable[[Stage, Fault], Any]


async def _again(role: Role) -> None:
    role.process.start()
    await _up(role)


async def _up(role: Role) -> None:
    # A Manager that stands by is alive, not ready.
    await role.ready("/healthz" if role.name.startswith("manager") else "/readyz")


async def _kill_worker(stage: Stage, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    stage.watch_recovery("kill", worker)
    worker.process.kill()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def _kill_engine(stage: Stage, fault: Fault) -> None:
    engine = engine_of(stage.workers[fault.target])
    if engine is not None:
        os.kill(engine, signal.SIGKILL)


def _kill(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.kill()
        await asyncio.sleep(fault.lasts_s)
        await _again(role)

    return deed


def _pause(roles: Callable[[Stage], Sequence[Role]]) -> Deed:
    async def deed(stage: Stage, fault: Fault) -> None:
        role = roles(stage)[fault.target]
        role.process.pause()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            role.process.resume()

    return deed


async def _pause_worker(stage: Stage, fault: Fault) -> None:
    if fault.lasts_s > 4.5:
        stage.watch_recovery("hang", stage.workers[fault.target])
    await _pause(lambda stage: stage.workers)(stage, fault)


async def _pause_engine(stage: Stage, fault: Fault) -> None:
    engine = engine_of(stage.workers[fault.target])
    if engine is None:
        return
    stage.watch_recovery("hang", stage.workers[fault.target])
    os.kill(engine, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)


async def _drain_worker(stage: Stage, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    worker.process.send(signal.SIGTERM)
    await worker.ended()
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


async def _kill_redis(stage: Stage, fault: Fault) -> None:
    stage.server.kill()
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(stage.server.start)


def _cut(links: Callable[[Stage], Sequence[FaultProxy]], *, silently: bool = False) -> Deed:
    async def deed(stage: Stage, fault: Fault) -> None:
        link = links(stage)[fault.target]
        if silently:
            link.silence()
        else:
            link.cut()
        await asyncio.sleep(fault.lasts_s)
        link.heal()

    return deed


async def _slow(stage: Stage, fault: Fault) -> None:
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.03
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.latency_s = 0.0


async def _slice(stage: Stage, fault: Fault) -> None:
    for number, link in enumerate((*stage.router_links, *stage.worker_links)):
        link.slice_bytes = 1 + number % 7
    await asyncio.sleep(fault.lasts_s)
    for link in (*stage.router_links, *stage.worker_links):
        link.slice_bytes = 0


async def _lose_replies(stage: Stage, fault: Fault) -> None:
    for link in stage.router_links:
        link.lose_reply(_marker("enqueue"))
    for number, call in enumerate(("settle", "claim", "publish")):
        stage.worker_links[(fault.target + number) % WORKERS].lose_reply(_marker(call))


async def _strike(stage: Stage, fault: Fault) -> None:
    worker = stage.workers[fault.target]
    struck = asyncio.Event()

    def kill() -> None:
        stage.watch_recovery("kill", worker)
        worker.process.send(signal.SIGKILL)
        struck.set()

    stage.worker_links[fault.target].strike(Strike(_marker(fault.call), fault.point, kill))
    try:
        async with asyncio.timeout(5):
            await struck.wait()
    except TimeoutError:
        stage.worker_links[fault.target].strike(None)
        return
    await asyncio.to_thread(worker.process.wait, 10)
    await asyncio.sleep(fault.lasts_s)
    await _again(worker)


def _burst(kind: str) -> Deed:
    async def deed(stage: Stage, fault: Fault) -> None:
        assert stage.clients is not None
        await stage.clients.burst(kind, BURSTS[kind])

    return deed


def engine_of(worker: Role) -> int | None:
    """The process of a worker's engine: the child of its guard. None while there is none."""
    for guard in _children(worker.process.pid):
        for engine in _children(guard):
            return engine
    return None


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


_DEEDS: dict[Kind, Deed] = {
    Kind.KILL_WORKER: _kill_worker,
    Kind.KILL_ENGINE: _kill_engine,
    Kind.KILL_ROUTER: _kill(lambda stage: stage.routers),
    Kind.KILL_MANAGER: _kill(lambda stage: stage.managers),
    Kind.KILL_REDIS: _kill_redis,
    Kind.PAUSE_WORKER: _pause_worker,
    Kind.PAUSE_ENGINE: _pause_engine,
    Kind.PAUSE_ROUTER: _pause(lambda stage: stage.routers),
    Kind.PAUSE_MANAGER: _pause(lambda stage: stage.managers),
    Kind.DRAIN_WORKER: _drain_worker,
    Kind.CUT_WORKER: _cut(lambda stage: stage.worker_links),
    Kind.CUT_ROUTER: _cut(lambda stage: stage.router_links),
    Kind.SILENT_WORKER: _cut(lambda stage: stage.worker_links, silently=True),
    Kind.SLOW_NETWORK: _slow,
    Kind.SLICED_NETWORK: _slice,
    Kind.LOSE_REPLIES: _lose_replies,
    Kind.STRIKE: _strike,
    Kind.DISCONNECTS: _burst("hurried"),
    Kind.STRANGERS: _burst("malformed"),
}
