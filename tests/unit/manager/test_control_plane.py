import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from manager import ManagerService
from manager.core import ProbeResult, ProbeStatus
from queue_schemas import (
    BrokerUnsuitable,
    ControlKind,
    EngineState,
    Heartbeat,
    Lane,
    LaneDepth,
    ManagerUnavailable,
    ModelNotFound,
    Pool,
    Registration,
    SessionId,
    UnknownWorker,
    WorkerId,
    WorkerIdTaken,
    WorkerState,
)
from queue_schemas.fleet.messages import MAX_TERM
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, FakeQueue, fast_settings

ONE, TWO = SessionId("w.0000000000000001"), SessionId("w.0000000000000002")
URL = "http://127.0.0.1:7000"


def _service(queue: FakeQueue, probe: FakeProbe | None = None, **settings: object) -> ManagerService:
    return ManagerService(fast_settings(**settings), queue.open, probe or FakeProbe(), broker_url="redis://here")


@asynccontextmanager
async def _alive(service: ManagerService) -> AsyncIterator[asyncio.Event]:
    """The service runs until the block ends, or until the event it gives is set."""
    stop = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run(stop))
        try:
            yield stop
        finally:
            stop.set()


@asynccontextmanager
async def _running(service: ManagerService) -> AsyncIterator[None]:
    """The service runs, and acts."""
    async with _alive(service):
        await _until(lambda: service.acting)
        yield


async def _until(condition: Callable[[], bool]) -> None:
    await eventually(condition, "the state that the test waits for")


def _registration(session_id: str = ONE, **fields: object) -> Registration:
    given = {"models": ["m"], "slots": 4, "engine": EngineState.READY, "url": URL} | fields
    return Registration.model_validate({"worker_id": "w", "session_id": session_id, **given})


def _heartbeat(session_id: str = ONE) -> Heartbeat:
    return Heartbeat(session_id=session_id, models=["m"], slots=4, engine=EngineState.READY)


async def test_a_worker_learns_everything_from_its_registration() -> None:
    """Address, shards, intervals and assignment come with the answer; the snapshot and the pool follow."""
    queue = FakeQueue()
    service = _service(queue, advertised_redis_url="redis://advertised")
    async with _running(service):
        answer = await service.register(_registration())
        assert (answer.broker_url, answer.shards) == ("redis://advertised", 2)
        assert (answer.lease_ms, answer.heartbeat_interval_ms) == (600, 60)
        assert [(pool.pool, pool.shard) for pool in answer.assignment.pools] == [("m", queue.shard_of("m"))]
        assert (await service.heartbeat("w", _heartbeat())).assignment == answer.assignment
        await _until(lambda: "w" in queue.workers and queue.pools == {"m": False})
        assert (await service.list_workers()).workers[0].heartbeat_age_ms < 1000
    assert queue.holder == "", "a clean end hands the lease back"


async def test_a_counter_that_stands_still_is_reclaimed_and_the_worker_forgotten() -> None:
    """A lease that nobody renews is taken back though heartbeats go on; the worker must then register again."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue)
    async with _running(service):
        await service.register(_registration())

        async def forgotten() -> bool:
            try:
                await service.heartbeat("w", _heartbeat())
            except UnknownWorker:
                return True
            return False

        await eventually(forgotten, "its heartbeats are unknown")
        await _until(lambda: set(queue.reclaimed) == {ONE})


async def test_unregistered_sessions_are_watched_too() -> None:
    """A number without a registration (the Manager lost its memory) is reclaimed when it stands still."""
    queue = FakeQueue(numbers={ONE: 1})
    async with _running(_service(queue)):
        await _until(lambda: set(queue.reclaimed) == {ONE})


async def test_a_silent_worker_with_a_refused_port_dies_at_once() -> None:
    """Its URL answered before, now refuses, and a ping is not answered: no need to wait for the lease."""
    queue = FakeQueue(numbers={ONE: 1})
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    service = _service(queue, probe, lease_ms=60_000, leader_lease_ms=5_000)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: probe.probes > 0)
        probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")
        await _until(lambda: set(queue.reclaimed) == {ONE})
        assert (await service.list_workers()).workers == []


@pytest.mark.parametrize(
    "first", [ProbeResult(ProbeStatus.OTHER, "answered by worker 'x'"), ProbeResult(ProbeStatus.REFUSED, "refuses")]
)
async def test_a_url_that_points_elsewhere_is_no_evidence(first: ProbeResult) -> None:
    """A URL that never answered as the worker kills nobody, however often it refuses; people see what is wrong."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue, FakeProbe({URL: first}), lease_ms=60_000, leader_lease_ms=5_000)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: "w" in queue.workers and queue.workers["w"].state is WorkerState.UNRESPONSIVE)
        await _until(lambda: queue.sweeps > 30)
        assert queue.reclaimed == []
        assert queue.workers["w"].url_note == first.note


async def test_a_worker_that_answers_pings_is_only_unresponsive() -> None:
    """Without heartbeats and with a refusing port, an answered ping keeps its work with it."""
    queue = FakeQueue(numbers={ONE: 1}, answers_pings={ONE})
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    service = _service(queue, probe, lease_ms=60_000, leader_lease_ms=5_000)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: probe.probes > 0)
        probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")
        await _until(lambda: len(queue.controls) > 2)
        assert {control.kind for _, control in queue.controls} == {ControlKind.PING}
        assert queue.reclaimed == []
        assert (await service.list_workers()).workers[0].state is WorkerState.UNRESPONSIVE


async def test_an_id_in_use_by_a_live_worker_is_refused() -> None:
    """A second session id is turned away while the first answers, and let in once it has gone silent for good."""
    queue = FakeQueue(numbers={ONE: 1}, answers_pings={ONE})
    service = _service(queue, lease_ms=60_000, leader_lease_ms=5_000)
    async with _running(service):
        await service.register(_registration(url=None))
        with pytest.raises(WorkerIdTaken, match="another --worker-id"):
            await service.register(_registration(TWO, url=None))
        assert (await service.list_workers()).workers[0].session_id == ONE
        queue.answers_pings.clear()
        await service.register(_registration(TWO, url=None))
        assert (await service.list_workers()).workers[0].session_id == TWO
        assert queue.reclaimed == [], "an unproven death is the lease's business"


async def test_a_restarted_worker_gets_its_jobs_freed_at_once() -> None:
    """The port now answers as the new session_id: the old one is certainly dead."""
    queue = FakeQueue(numbers={ONE: 1})
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    service = _service(queue, probe, lease_ms=60_000, leader_lease_ms=5_000)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: probe.probes > 0)
        probe.results[URL] = ProbeResult(ProbeStatus.OTHER, "another session")
        await service.register(_registration(TWO))
        assert set(queue.reclaimed) == {ONE}


async def test_a_fenced_worker_may_come_back_as_a_new_session() -> None:
    """After a reclaim its id is free for the next run at once, even if it registered under the old one meanwhile."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue, unresponsive_after_ms=60_000)
    async with _running(service):
        await service.register(_registration(url=None))
        await _until(lambda: set(queue.reclaimed) == {ONE})
        await service.register(_registration(url=None))
        await service.register(_registration(TWO, url=None))


async def test_a_fenced_worker_may_come_back_while_its_reclaim_is_under_way() -> None:
    """A session that was declared dead holds its id no more, whether or not every shard has answered the reclaim."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue, unresponsive_after_ms=60_000)
    async with _running(service):
        await service.register(_registration(url=None))
        queue.reclaims_go_on.clear()
        await _until(lambda: set(queue.reclaimed) == {ONE})
        await service.register(_registration(url=None))
        await service.register(_registration(TWO, url=None))
        queue.reclaims_go_on.set()


async def test_two_newcomers_with_one_id_do_not_both_win() -> None:
    """Of two registrations at the same moment one is refused."""
    service = _service(FakeQueue())
    async with _running(service):
        answers = await asyncio.gather(
            service.register(_registration(ONE, url=None)),
            service.register(_registration(TWO, url=None)),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, WorkerIdTaken) for answer in answers) == 1


async def test_redis_away_and_back_kills_nobody() -> None:
    """Stillness during an outage does not count, and the fleet is as it was."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: "w" in queue.workers)
        queue.down = True
        await _until(lambda: not service.acting)
        with pytest.raises(ManagerUnavailable):
            await service.heartbeat("w", _heartbeat())
        assert service.not_ready()
        await asyncio.sleep(0.7)  # longer than a lease: the outage itself is what is tested
        queue.down = False
        await _until(lambda: service.acting and not service.not_ready())
        sweeps = queue.sweeps
        await service.heartbeat("w", _heartbeat())
        await _until(lambda: queue.sweeps > sweeps + 5)
        assert queue.reclaimed == []


async def test_one_of_two_managers_acts_and_the_other_takes_over() -> None:
    """The standby refuses changes, shows the fleet from the snapshot, and goes on with it under a higher term."""
    queue = FakeQueue()
    one, other = _service(queue), _service(queue)
    async with _alive(one) as stop_one:
        await _until(lambda: one.acting)
        async with _alive(other):
            await _until(lambda: other.not_ready() == ["standing by: another Manager acts"])
            before = (await one.register(_registration(url=None))).assignment
            await _until(lambda: "w" in queue.workers)
            with pytest.raises(ManagerUnavailable, match="another Manager acts"):
                await other.heartbeat("w", _heartbeat())
            assert [info.worker_id for info in (await other.list_workers()).workers] == ["w"]
            stop_one.set()
            await _until(lambda: other.acting)
            after = (await other.heartbeat("w", _heartbeat())).assignment
            assert after.order > before.order
            assert after.pools == before.pools


async def test_a_manager_that_hung_does_not_act_any_more() -> None:
    """Once the lease's length has passed without a renewal nothing is decided, even before Redis was asked again."""
    ahead_s = 0.0
    service = ManagerService(
        fast_settings(),
        FakeQueue().open,
        FakeProbe(),
        broker_url="redis://here",
        clock=lambda: time.monotonic() + ahead_s,
    )
    async with _running(service):
        ahead_s = service.settings.leader_lease_ms / 1000
        with pytest.raises(ManagerUnavailable, match="not renewed in time"):
            await service.heartbeat("w", _heartbeat())
        await _until(lambda: service.acting)


async def test_a_drain_is_requested_both_ways() -> None:
    """The control stream and the next heartbeat's answer both say drain; nothing is assigned any more."""
    queue = FakeQueue(numbers={ONE: 1})
    service = _service(queue)
    async with _running(service):
        await service.register(_registration())
        info = await service.drain("w")
        assert (info.state, info.assignment.pools) == (WorkerState.DRAINING, [])
        assert (ONE, ControlKind.DRAIN) in [(session_id, control.kind) for session_id, control in queue.controls]
        assert (await service.heartbeat("w", _heartbeat())).drain
        with pytest.raises(UnknownWorker):
            await service.drain("nobody")


async def test_deregistered_workers_leave_no_trace() -> None:
    """A deregistered worker is gone from the list and from the snapshot; a late goodbye is told so."""
    queue = FakeQueue()
    service = _service(queue)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: "w" in queue.workers)
        with pytest.raises(UnknownWorker):
            await service.deregister("w", TWO)
        await service.deregister("w", ONE)
        await _until(lambda: "w" not in queue.workers)


async def test_a_deregistration_just_before_the_end_is_saved() -> None:
    """A Manager that is stopped in that very moment leaves no worker behind that has gone."""
    queue = FakeQueue()
    service = _service(queue)
    async with _running(service):
        await service.register(_registration())
        await _until(lambda: "w" in queue.workers)
        await service.deregister("w", ONE)
    assert queue.workers == {}


async def test_pools_are_declared_or_remembered() -> None:
    """Declared models are known before any worker, and so is what others declared or was served."""
    queue = FakeQueue(pools={Pool("old"): True})
    queue.waiting = {Pool("m"): {Lane.INTERACTIVE: LaneDepth(waiting=3, leased=1, oldest_age_ms=50)}}
    service = _service(queue, pools=["declared"])
    async with _running(service):
        await _until(lambda: queue.pools == {"old": True, "declared": True})
        await service.register(_registration(models=["m", "declared"]))
        await _until(lambda: "m" in queue.pools)
        assert queue.pools[Pool("declared")] is True
        pools = (await service.pools()).pools
        assert [pool.model for pool in pools] == ["declared", "m", "old"]
        pool = await service.pool("m")
        assert (pool.waiting, pool.leased, pool.outstanding, pool.workers, pool.slots) == (3, 1, 4, 1, 4)
        assert set(pool.lanes) == set(Lane)
        with pytest.raises(ModelNotFound):
            await service.pool("nowhere")


async def test_a_redis_that_is_not_there_yet_is_waited_for() -> None:
    """Started before Redis, the Manager says so and begins when it comes."""
    queue = FakeQueue(down=True)
    service = _service(queue)
    async with _alive(service):
        await _until(lambda: service.not_ready() == ["Redis is away"])
        with pytest.raises(ManagerUnavailable, match="Redis is away"):
            await service.pools()
        queue.down = False
        await _until(lambda: service.acting)


async def test_an_unsuitable_redis_ends_the_manager() -> None:
    """A server that cannot carry the queue is not waited for."""

    @asynccontextmanager
    async def unsuitable() -> AsyncIterator[FakeQueue]:
        raise BrokerUnsuitable("too old")
        yield FakeQueue()

    service = ManagerService(fast_settings(), unsuitable, FakeProbe(), broker_url="redis://here")
    with pytest.raises(BrokerUnsuitable, match="too old"):
        await service.run(asyncio.Event())


async def test_a_cancelled_manager_resigns() -> None:
    """Cancellation ends every loop and hands the lease back."""
    queue = FakeQueue()
    service = _service(queue)
    running = asyncio.create_task(service.run(asyncio.Event()))
    await _until(lambda: service.acting)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert queue.holder == ""
    assert not service.acting


async def test_a_newcomer_is_looked_at_at_once() -> None:
    """Not at the next sweep: until its URL was verified once, its death would be missed by its lease only."""
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    service = _service(FakeQueue(), probe, lease_ms=20_000, sweep_interval_ms=5_000)
    async with _running(service):
        await service.register(_registration())
        await eventually(lambda: probe.probes, "it is probed", limit_s=3)

        async def verified() -> bool:
            return (await service.list_workers()).workers[0].url_verified

        await eventually(verified, "it is known there", limit_s=3)


async def test_sweeps_go_on_while_newcomers_are_looked_at() -> None:
    """URLs that take long to answer, of ever more newcomers, do not interrupt the watch of the renewal counters."""
    asked, answers = asyncio.Event(), asyncio.Event()

    class SlowProbe(FakeProbe):
        async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
            asked.set()
            await answers.wait()
            return ProbeResult(ProbeStatus.SAME)

    queue = FakeQueue()
    service = _service(queue, SlowProbe(), lease_ms=20_000, sweep_interval_ms=200)
    async with _running(service):
        await service.register(_registration())
        await asked.wait()
        begun = queue.sweeps
        await _until(lambda: queue.sweeps > begun + 2)
        answers.set()


@pytest.mark.parametrize("ahead", [1, 3, MAX_TERM])
async def test_no_message_of_a_worker_moves_the_term(ahead: int) -> None:
    """[A2] A worker says that it follows a later term, as after lost writes of Redis or by a lie: the term stays, the
    heartbeat is answered "register again", and what the registration brings is of this term."""
    queue = FakeQueue()
    service = _service(queue)
    async with _running(service):
        await service.register(Registration(worker_id="w", session_id=ONE, slots=1, models=["m"]))
        term = queue.term
        said = min(term + ahead, MAX_TERM)
        other = Registration(worker_id="x", session_id=TWO, slots=1, models=["m"], term=said)
        assert (await service.register(other)).assignment.term == term
        with pytest.raises(UnknownWorker, match="register again"):
            await service.heartbeat("x", Heartbeat(session_id=TWO, slots=1, models=["m"], term=said))
        follows = Heartbeat(session_id=TWO, slots=1, models=["m"], term=term)
        assert (await service.heartbeat("x", follows)).assignment.term == term
        await asyncio.sleep(0.2)  # longer than the lease is renewed apart
        assert queue.term == term


async def test_a_worker_that_follows_its_manager_leaves_the_term_alone() -> None:
    """Registered and heard, and registered again with what it was given: nothing is to be raised."""
    queue = FakeQueue()
    service = _service(queue)
    async with _running(service):
        worker = Registration(worker_id="w", session_id=ONE, slots=1, models=["m"])
        term = (await service.register(worker)).assignment.term
        for _ in range(2):
            await service.heartbeat("w", Heartbeat(session_id=ONE, slots=1, models=["m"], term=term))
            await service.register(worker.model_copy(update={"term": term}))
        await asyncio.sleep(0.2)
        assert queue.term == term


async def test_a_server_that_becomes_unfit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G6] What the look at the queue's servers finds stands on the health page until it is put right."""
    monkeypatch.setattr("manager.control_plane.VET_EVERY_S", 0.01)
    queue = FakeQueue()
    service = _service(queue)
    async with _alive(service):
        await eventually(lambda: service.acting and not service.not_ready(), "it acts")
        queue.faults = ["Redis would evict waiting jobs"]
        await eventually(lambda: service.not_ready() == queue.faults, "it is said")
        assert service.acting
        queue.faults = []
        await eventually(lambda: not service.not_ready(), "it is forgiven")
