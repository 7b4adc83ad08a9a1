"""The Manager on a real Valkey, with workers reduced to what it sees of them: renewals, pings, heartbeats, a port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from broker import Broker, BrokerSettings
from manager import ManagerService
from manager.probe import HttpWorkerProbe
from manager.service import open_broker
from queue_schemas import (
    LANES,
    ControlKind,
    EngineState,
    Heartbeat,
    InferqError,
    Job,
    Lease,
    ManagerUnavailable,
    Outcome,
    Pool,
    Registration,
    SessionId,
    Settled,
    Tenant,
    UnknownWorker,
    WorkerIdTaken,
    WorkerState,
    new_job_id,
    new_session_id,
)
from telemetry.http.server import bind_socket, run_server
from tests.support.servers import Server
from tests.support.waiting import eventually
from tests.unit.manager.fakes import fast_settings

MODEL = Pool("org/model")
BEAT_S = 0.1


class MiniWorker:
    """Joins, renews, answers pings, heartbeats; each of these can be switched off."""

    def __init__(self, service: ManagerService, broker: Broker, worker_id: str = "w") -> None:
        self.service = service
        self.worker_id = worker_id
        self.session_id = new_session_id(worker_id)
        self.url: str | None = None
        self.drain_heard = False
        self._broker = broker
        self._seq = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._close_door = asyncio.Event()

    async def start(self) -> MiniWorker:
        await self._broker.workers.join(self.session_id)
        self._tasks["renew"] = asyncio.create_task(self._renew())
        self._tasks["control"] = asyncio.create_task(self._control())
        await self.register()
        self._tasks["heartbeat"] = asyncio.create_task(self._heartbeat())
        return self

    async def register(self) -> None:
        await self.service.register(Registration(worker_id=self.worker_id, url=self.url, **self.status().model_dump()))

    async def open_door(self) -> None:
        """Serve a health page on a port of its own."""
        listener = bind_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._tasks["door"] = asyncio.create_task(run_server(self._health, sock=listener, stop=self._close_door))

    async def die(self, *parts: str) -> None:
        """Stop these parts, or all, as a SIGKILL would: no goodbye."""
        for name in parts or list(self._tasks):
            task = self._tasks.pop(name)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def claim(self) -> Lease | None:
        self._seq += 1
        shard = self._broker.shard_of(MODEL)
        claimed = await self._broker.workers.claim(shard, self.session_id, self._seq, self._seq, 1, [(MODEL, LANES)])
        return claimed.leases[0] if claimed.leases else None

    def status(self) -> Heartbeat:
        return Heartbeat(session_id=self.session_id, models=[MODEL], slots=2, engine=EngineState.READY)

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(InferqError):
                await self._broker.workers.renew(self.session_id)
            await asyncio.sleep(BEAT_S)

    async def _control(self) -> None:
        after = "0"
        while True:
            with contextlib.suppress(InferqError):
                for entry_id, message in await self._broker.workers.read_control(0, self.session_id, after, 1000):
                    after = entry_id
                    if message is not None and message.kind is ControlKind.PING:
                        await self._broker.workers.renew(self.session_id)
                    self.drain_heard |= message is not None and message.kind is ControlKind.DRAIN
            await asyncio.sleep(0)

    async def _heartbeat(self) -> None:
        while True:
            try:
                await self.service.heartbeat(self.worker_id, self.status())
            except UnknownWorker:
                await self.register()
            except ManagerUnavailable:
                pass
            await asyncio.sleep(self.service.settings.heartbeat_interval_ms / 1000)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.dumps({"worker_id": self.worker_id, "session_id": self.session_id})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def manager(server: Server, *, acts: bool = True, **settings: object) -> AsyncIterator[ManagerService]:
    """A Manager on ``server``, stopped cleanly at the end."""
    stop = asyncio.Event()
    broker_settings = BrokerSettings(redis_url=server.url, command_timeout_ms=1_000, connect_timeout_ms=1_000)
    async with HttpWorkerProbe(0.5) as probe, asyncio.TaskGroup() as tasks:
        service = ManagerService(fast_settings(**settings), open_broker(broker_settings), probe, broker_url=server.url)
        tasks.create_task(service.run(stop))
        try:
            if acts:
                await eventually(lambda: service.acting, "the Manager acts")
            yield service
        finally:
            stop.set()


@asynccontextmanager
async def worker(service: ManagerService, broker: Broker, *, door: bool = False) -> AsyncIterator[MiniWorker]:
    """A running worker, dead at the end at the latest."""
    mini = MiniWorker(service, broker)
    try:
        if door:
            await mini.open_door()
        yield await mini.start()
    finally:
        await mini.die()


async def _enqueue(broker: Broker) -> Job:
    job = Job(id=new_job_id(0), tenant=Tenant("t"), model=MODEL, path="/v1/completions", body=b"{}", persisted=True)
    await broker.jobs.enqueue(job)
    return job


async def _beats(broker: Broker) -> set[SessionId]:
    return set(await broker.maintenance.renewal_counters())


async def test_a_dead_workers_job_waits_again_after_a_still_lease(valkey: Server, broker: Broker) -> None:
    """A worker that vanishes without a trace loses its job after a lease; another finishes it, the late result is
    fenced."""
    async with manager(valkey) as service, worker(service, broker) as lost:
        await _enqueue(broker)
        lease = await lost.claim()
        assert lease is not None
        await lost.die()
        await eventually(lambda: _gone(broker, lost), "its renewal counter is gone")
        assert (await service.list_workers()).workers == []
        async with worker(service, broker) as other:
            again = await other.claim()
            assert again is not None
            assert (again.job.id, again.epoch, again.attempt) == (lease.job.id, lease.epoch + 1, 2)
            assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.FENCED
            assert await broker.attempts.settle(again, Outcome.DONE) is Settled.OK


async def _gone(broker: Broker, mini: MiniWorker) -> bool:
    return mini.session_id not in await _beats(broker)


async def test_a_refused_port_and_an_unanswered_ping_are_certain(valkey: Server, broker: Broker) -> None:
    """With a lease of a minute, a killed worker whose port is closed is dead within moments."""
    async with manager(valkey, lease_ms=60_000) as service, worker(service, broker, door=True) as lost:
        await eventually(lambda: _verified(service), "its URL was verified")
        await _enqueue(broker)
        assert await lost.claim() is not None
        await lost.die()
        await eventually(lambda: _gone(broker, lost), "it was reclaimed long before its lease")
        depth = await service.pool(MODEL)
        assert (depth.waiting, depth.leased, depth.workers) == (1, 0, 0)


async def _verified(service: ManagerService) -> bool:
    term = service._leadership.term
    return term is not None and any(member.verified for member in term.registry.members())


async def test_a_worker_that_only_the_manager_cannot_hear_keeps_its_work(valkey: Server, broker: Broker) -> None:
    """Without heartbeats and with its port closed, but renewing: unresponsive, still leased after several leases, its
    result accepted."""
    async with manager(valkey) as service, worker(service, broker, door=True) as cut_off:
        await eventually(lambda: _verified(service), "its URL was verified")
        await _enqueue(broker)
        lease = await cut_off.claim()
        assert lease is not None
        await cut_off.die("heartbeat", "door")
        await eventually(lambda: _state(service, WorkerState.UNRESPONSIVE), "it is unresponsive")
        assert (await service.pool(MODEL)).workers == 0
        await asyncio.sleep(2 * service.settings.lease_ms / 1000)  # the behaviour is that nothing happens meanwhile
        assert await _state(service, WorkerState.UNRESPONSIVE)
        assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def _state(service: ManagerService, state: WorkerState) -> bool:
    return [info.state for info in (await service.list_workers()).workers] == [state]


async def test_a_new_manager_goes_on_where_the_last_one_stopped(valkey: Server, broker: Broker) -> None:
    """After a restart the fleet is there before anybody registers, and a lease that is renewed is not touched."""
    async with AsyncExitStack() as first_run:
        first = await first_run.enter_async_context(manager(valkey))
        async with worker(first, broker) as mini:
            await _enqueue(broker)
            lease = await mini.claim()
            await eventually(broker.fleet.load_workers, "the registry was written down")
            before = (await first.list_workers()).workers[0]
            await mini.die("heartbeat")
            await first_run.aclose()
            async with manager(valkey) as second:
                (after,) = (await second.list_workers()).workers
                assert (after.session_id, after.models, after.slots) == (mini.session_id, [MODEL], 2)
                assert after.assignment.order > before.assignment.order
                answer = await second.heartbeat("w", mini.status())
                assert answer.assignment.pools == before.assignment.pools
                assert lease is not None
                assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_only_one_of_two_managers_acts(valkey: Server, broker: Broker) -> None:
    """The second stands by, refuses changes, shows the fleet, and takes over when the first ends."""
    async with manager(valkey, acts=False) as second:
        async with manager(valkey, acts=False) as first:
            await eventually(lambda: first.acting or second.acting, "one acts")
            acting, standby = (first, second) if first.acting else (second, first)
            assert not standby.acting
            async with worker(acting, broker):
                with pytest.raises(ManagerUnavailable):
                    await standby.heartbeat("w", Heartbeat(session_id="w.0000000000000001", slots=1))
                await eventually(broker.fleet.load_workers, "the registry was written down")
                assert [info.worker_id for info in (await standby.list_workers()).workers] == ["w"]
        await eventually(lambda: second.acting, "the one that is left acts")


async def test_an_id_in_use_is_refused_while_its_worker_answers(valkey: Server, broker: Broker) -> None:
    """A second worker of the same id is told so; once the first is gone for good it may have the id."""
    async with manager(valkey, lease_ms=60_000) as service, worker(service, broker) as first:
        second = MiniWorker(service, broker)
        with pytest.raises(WorkerIdTaken):
            await second.register()
        await first.die()
        await second.register()
        (info,) = (await service.list_workers()).workers
        assert info.session_id == second.session_id


async def test_a_restarted_worker_frees_its_jobs_at_once(valkey: Server, broker: Broker) -> None:
    """A new run behind the same URL proves the old one dead: its job waits again without waiting for the lease."""
    async with manager(valkey, lease_ms=60_000) as service, worker(service, broker, door=True) as mini:
        await eventually(lambda: _verified(service), "its URL was verified")
        await _enqueue(broker)
        assert await mini.claim() is not None
        await mini.die("renew", "control", "heartbeat")
        old, mini.session_id = mini.session_id, new_session_id("w")
        await mini.start()
        assert old not in await _beats(broker)
        again = await mini.claim()
        assert again is not None and again.attempt == 2


async def test_a_drain_reaches_a_worker_that_only_reads_its_control_stream(valkey: Server, broker: Broker) -> None:
    """The Manager never needs to call a worker."""
    async with manager(valkey) as service, worker(service, broker) as mini:
        await service.drain("w")
        await eventually(lambda: mini.drain_heard, "the drain came over the control stream")


async def test_redis_killed_and_back_kills_nobody(own_valkey: Server) -> None:
    """Redis is away for longer than a lease: afterwards the worker still holds its job, and the Manager acts again."""
    settings = BrokerSettings(redis_url=own_valkey.url, retry_limit_ms=10_000, command_timeout_ms=1_000)
    broker = await Broker.connect(settings)
    try:
        # A lease well above the pauses between a worker's tries to reach Redis again.
        async with manager(own_valkey, lease_ms=2_000) as service, worker(service, broker) as mini:
            await _enqueue(broker)
            lease = await mini.claim()
            await asyncio.sleep(1.5)  # appendfsync everysec: what is tested is the outage, not the last second
            own_valkey.kill()
            await eventually(lambda: not service.acting and service.not_ready(), "the Manager has noticed")
            await asyncio.sleep(1.5 * service.settings.lease_ms / 1000)
            own_valkey.restart()
            await eventually(lambda: service.acting and not service.not_ready(), "the Manager acts again", limit_s=20)
            await eventually(lambda: _state(service, WorkerState.ACTIVE), "the worker is heard again")
            assert mini.session_id in await _beats(broker)
            assert lease is not None
            assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK
    finally:
        await broker.close()
