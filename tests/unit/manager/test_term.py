import asyncio
import time
from collections.abc import Callable, Iterable

import pytest

from manager.core import Door, DoorState
from manager.metrics import FleetMetrics
from manager.term import SNAPSHOT_CHECK_S, Fleet
from queue_schemas import (
    BrokerUnavailable,
    EngineState,
    Heartbeat,
    Pool,
    Registration,
    SessionId,
    WorkerId,
    WorkerIdTaken,
    WorkerInfo,
)
from telemetry import MetricsRegistry
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, FakeQueue, fast_settings

ONE = SessionId("w.0000000000000001")
URL = "http://127.0.0.1:7000"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _fleet(queue: FakeQueue, clock: Callable[[], float], probe: FakeProbe | None = None, declared: str = "") -> Fleet:
    settings = fast_settings(lease_ms=15_000, heartbeat_ms=2_000, suspect_ms=6_000, pools=declared)
    metrics = FleetMetrics(MetricsRegistry("manager"))
    return Fleet(settings, queue, probe or FakeProbe(), metrics, 1, asyncio.Event(), clock)


def _registration() -> Registration:
    return Registration(worker_id="w", session_id=ONE, models=["m"], slots=1, engine=EngineState.READY, url=URL)


async def _sweep_each_second(fleet: Fleet, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        await fleet.sweep()


async def test_one_failed_poll_restarts_the_watch() -> None:
    """Redis must have been in reach throughout: a single failed poll gives every lease its whole length again."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    fleet = _fleet(queue, clock)
    await _sweep_each_second(fleet, clock, 14)
    queue.down = True
    with pytest.raises(BrokerUnavailable):
        await _sweep_each_second(fleet, clock, 1)
    queue.down = False
    await _sweep_each_second(fleet, clock, 15)
    assert queue.reclaimed == []
    await _sweep_each_second(fleet, clock, 1)
    assert queue.reclaimed == [ONE]


async def test_a_reclaim_that_failed_is_tried_again() -> None:
    """The dead are taken back in the next round when Redis went away in this one, though nobody watches them now."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    fleet = _fleet(queue, clock)
    await fleet.register(_registration())
    await _sweep_each_second(fleet, clock, 15)
    queue.refuses_reclaims = True
    with pytest.raises(BrokerUnavailable):
        await _sweep_each_second(fleet, clock, 1)
    queue.numbers.clear()
    queue.refuses_reclaims = False
    await _sweep_each_second(fleet, clock, 1)
    assert queue.reclaimed == [ONE]


async def test_a_heartbeat_that_comes_while_it_is_doubted_saves_a_worker() -> None:
    """The verdict of an examination does not hold against a worker that was heard meanwhile."""
    queue, clock = FakeQueue(), Clock()
    probe = FakeProbe({URL: Door(DoorState.SAME)})
    fleet = _fleet(queue, clock, probe)
    await fleet.register(_registration())
    await fleet.sweep()
    probe.doors[URL] = Door(DoorState.REFUSED, "refuses")

    def heard() -> None:
        fleet.registry.join(_registration(), clock.now)

    clock.now += 5
    probe.while_looking = heard
    await fleet.sweep()
    assert fleet.registry.find("w") is not None
    clock.now += 5
    probe.while_looking = None
    await fleet.sweep()
    assert fleet.registry.find("w") is None


async def test_silence_shorter_than_two_heartbeats_raises_no_doubt() -> None:
    """A worker heard a moment ago is not looked at again."""
    queue, clock, probe = FakeQueue(numbers={ONE: 1}), Clock(), FakeProbe({URL: Door(DoorState.SAME)})
    fleet = _fleet(queue, clock, probe)
    await fleet.register(_registration())
    await fleet.sweep()
    looks = probe.looks
    clock.now += 3.9
    await fleet.sweep()
    assert probe.looks == looks
    clock.now += 0.1
    await fleet.sweep()
    assert probe.looks == looks + 1


async def test_a_doubt_is_looked_into_at_once() -> None:
    """The connection that a worker held broke, its port refuses, its ping is not answered: its jobs are taken back
    without a sweep."""
    queue, probe = FakeQueue(numbers={ONE: 1}), FakeProbe({URL: Door(DoorState.SAME)})
    fleet = _fleet(queue, time.monotonic, probe)
    await fleet.register(_registration())
    await fleet.sweep()
    probe.doors[URL] = Door(DoorState.REFUSED, "refuses")
    await fleet.doubt("w", ONE)
    assert queue.reclaimed == [ONE]
    assert fleet.registry.find("w") is None


async def test_who_is_doubted_twice_is_buried_once() -> None:
    """The sweep misses a worker's heartbeats, and looks at it, when its connection breaks: it is one death."""
    declared_dead = asyncio.Event()

    class SlowAtFirst(FakeProbe):
        async def look(self, url: str, worker_id: WorkerId, session_id: SessionId) -> Door:
            door = await super().look(url, worker_id, session_id)
            if self.looks == seen + 1:
                await declared_dead.wait()
            return door

    seen = 1_000
    queue, clock, probe = FakeQueue(), Clock(), SlowAtFirst({URL: Door(DoorState.SAME)})
    fleet = _fleet(queue, clock, probe)
    await fleet.register(_registration())
    await fleet.sweep()
    seen = probe.looks
    probe.doors[URL] = Door(DoorState.REFUSED, "refuses")
    clock.now += 5
    sweep = asyncio.create_task(fleet.sweep())
    await eventually(lambda: probe.looks > seen, "the sweep looks")
    await fleet.doubt("w", ONE)
    declared_dead.set()
    await sweep
    assert queue.reclaimed == [ONE]


@pytest.mark.parametrize("proof", ["its door", "its ping", "not verified", "another run", "unknown"])
async def test_a_doubt_alone_buries_nobody(proof: str) -> None:
    """It is a hint that anybody may give: what counts is what the worker's port and its renewal number say."""
    queue = FakeQueue(numbers={ONE: 1})
    probe = FakeProbe({URL: Door(DoorState.UNKNOWN if proof == "not verified" else DoorState.SAME)})
    fleet = _fleet(queue, time.monotonic, probe)
    await fleet.register(_registration())
    await fleet.sweep()
    if proof != "its door":
        probe.doors[URL] = Door(DoorState.REFUSED, "refuses")
    if proof == "its ping":
        queue.answers_pings.add(ONE)
    run = SessionId("w.0000000000000002") if proof == "another run" else ONE
    await fleet.doubt("stranger" if proof == "unknown" else "w", run)
    assert queue.reclaimed == []
    assert fleet.registry.find("w") is not None


async def test_pools_stay_known_while_they_are_served_or_declared() -> None:
    """Both are remembered anew from time to time, though somebody else ended the declaration; others are left alone."""
    queue, clock = FakeQueue(), Clock()
    fleet = _fleet(queue, clock, declared="d")
    await fleet.register(_registration())
    await fleet.save()
    assert queue.remembered == {"m": False, "d": True}
    queue.remembered = {Pool("d"): False, Pool("x"): True}
    clock.now += 599
    await fleet.save()
    assert queue.remembered == {"d": False, "x": True}
    clock.now += 1
    await fleet.save()
    assert queue.remembered == {"m": False, "d": True, "x": True}


async def test_a_snapshot_that_others_changed_is_written_again() -> None:
    """A late write of the Manager before, or a Redis that lost its latest writes, is mended within seconds."""
    queue, clock = FakeQueue(), Clock()
    fleet = _fleet(queue, clock)
    await fleet.register(_registration())
    await fleet.save()
    right = dict(queue.workers)
    stale = right["w"].model_copy(update={"models": ["gone"]})
    for wrong in ({}, {"w": stale}, right | {"ghost": stale.model_copy(update={"worker_id": "ghost"})}):
        queue.workers = dict(wrong)
        clock.now += SNAPSHOT_CHECK_S
        await fleet.save()
        assert queue.workers == right


async def test_who_is_only_in_the_snapshot_keeps_no_newcomer_out() -> None:
    """A worker that left while no Manager acted looks, for a while, as if it had just registered: it was not heard."""
    queue, clock = FakeQueue(), Clock()
    before = _fleet(queue, clock)
    await before.register(_registration())
    await before.save()
    again = _registration().model_copy(update={"session_id": "w.0000000000000002"})
    with pytest.raises(WorkerIdTaken):
        await before.register(again)
    after = _fleet(queue, clock)
    await after.load()
    assert (await after.register(again)).session_id == again.session_id


def _heartbeat(**fields: object) -> Heartbeat:
    return Heartbeat.model_validate(_registration().model_dump(include=Heartbeat.model_fields.keys()) | fields)


async def test_only_entries_that_changed_are_written() -> None:
    """[G10] Of many workers the one that changed is written at once; how busy they are is written with the next sweep,
    and heartbeats that say nothing new cause no call at all."""
    queue, clock = FakeQueue(), Clock()
    fleet = _fleet(queue, clock)
    saved: list[list[str]] = []
    save_workers = queue.fleet.save_workers

    async def recording(changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None:
        changed, gone = list(changed), list(gone)
        saved.append([*(info.worker_id for info in changed), *gone])
        await save_workers(changed, gone)

    queue.fleet.save_workers = recording  # type: ignore[method-assign]
    for number in range(50):
        own = {"url": None, "worker_id": f"w{number}", "session_id": f"w{number}.{number:016x}"}
        await fleet.register(Registration.model_validate(_registration().model_dump() | own))
    await fleet.save()
    assert len(saved.pop()) == 50
    fleet.changed.clear()

    def beat(number: int, **fields: object) -> None:
        fleet.heartbeat(f"w{number}", _heartbeat(session_id=f"w{number}.{number:016x}", **fields))

    before = queue.round_trips
    for number in range(50):
        beat(number)
    assert not fleet.changed.is_set()
    beat(7, running=1)
    assert not fleet.changed.is_set()
    assert queue.round_trips == before
    await fleet.sweep()
    assert fleet.changed.is_set()
    await fleet.save()
    assert saved.pop() == ["w7"]
    beat(9, engine=EngineState.FAILED)
    assert fleet.changed.is_set()
    await fleet.save()
    fleet.leave("w3", f"w3.{3:016x}")
    await fleet.save()
    assert saved == [["w9"], ["w3"]]
    assert len(queue.workers) == 49


async def test_one_shard_that_is_away_does_not_stop_the_others() -> None:
    """[G8] Renewal numbers, deadlines and reclaims of the shards that answer go on; the dead's jobs on the other
    shard are taken back once that is back."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    fleet = _fleet(queue, clock)
    await _sweep_each_second(fleet, clock, 2)
    queue.away = {1}
    queue.swept.clear()
    await _sweep_each_second(fleet, clock, 20)
    assert fleet.shards_away == {1}
    assert queue.reclaimed_on == [(0, ONE)]
    assert set(queue.swept) == {0}
    assert len(queue.swept) >= 18
    queue.away = set()

    async def back() -> bool:
        await fleet.sweep()
        return (1, ONE) in queue.reclaimed_on

    await eventually(back, "its jobs on the other shard are taken back", every_s=0.1)
    assert queue.swept[-1] == 1
    fleet.close()
