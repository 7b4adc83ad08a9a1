import asyncio
import time
from collections.abc import Callable, Iterable

import pytest

from manager import shard_sweeps
from manager.core import ProbeResult, ProbeStatus
from manager.metrics import FleetMetrics
from manager.registry_snapshot import SNAPSHOT_CHECK_S
from manager.term import Term
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
from telemetry.backoff import Backoff
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


def _term(queue: FakeQueue, clock: Callable[[], float], probe: FakeProbe | None = None, declared: str = "") -> Term:
    settings = fast_settings(lease_ms=15_000, heartbeat_interval_ms=2_000, unresponsive_after_ms=6_000, pools=declared)
    metrics = FleetMetrics(MetricsRegistry("manager"))
    return Term(settings, queue, probe or FakeProbe(), metrics, 1, asyncio.Event(), clock)


def _registration() -> Registration:
    return Registration(worker_id="w", session_id=ONE, models=["m"], slots=1, engine=EngineState.READY, url=URL)


async def _sweep_each_second(term: Term, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        await term.sweep()


async def test_one_failed_poll_restarts_the_watch() -> None:
    """Redis must have been in reach throughout: a single failed poll gives every lease its whole length again."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    term = _term(queue, clock)
    await _sweep_each_second(term, clock, 14)
    queue.down = True
    with pytest.raises(BrokerUnavailable):
        await _sweep_each_second(term, clock, 1)
    queue.down = False
    await _sweep_each_second(term, clock, 15)
    assert queue.reclaimed == []
    await _sweep_each_second(term, clock, 1)
    assert queue.reclaimed == [ONE]


async def test_a_reclaim_that_failed_is_tried_again() -> None:
    """The dead are taken back in the next round when Redis went away in this one, though nobody watches them now."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    term = _term(queue, clock)
    await term.register(_registration())
    await _sweep_each_second(term, clock, 15)
    queue.refuses_reclaims = True
    with pytest.raises(BrokerUnavailable):
        await _sweep_each_second(term, clock, 1)
    queue.numbers.clear()
    queue.refuses_reclaims = False
    await _sweep_each_second(term, clock, 1)
    assert queue.reclaimed == [ONE]


async def test_a_heartbeat_during_a_check_saves_a_worker() -> None:
    """The result of a check does not hold against a worker that was heard meanwhile."""
    queue, clock = FakeQueue(), Clock()
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    term = _term(queue, clock, probe)
    await term.register(_registration())
    await term.sweep()
    probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")

    def heard() -> None:
        term.registry.join(_registration(), clock.now)

    clock.now += 5
    probe.while_probing = heard
    await term.sweep()
    assert term.registry.find("w") is not None
    clock.now += 5
    probe.while_probing = None
    await term.sweep()
    assert term.registry.find("w") is None


async def test_silence_shorter_than_two_heartbeats_is_not_checked() -> None:
    """A worker heard a moment ago is not probed again."""
    queue, clock, probe = FakeQueue(numbers={ONE: 1}), Clock(), FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    term = _term(queue, clock, probe)
    await term.register(_registration())
    await term.sweep()
    probes = probe.probes
    clock.now += 3.9
    await term.sweep()
    assert probe.probes == probes
    clock.now += 0.1
    await term.sweep()
    assert probe.probes == probes + 1


async def test_a_broken_session_connection_is_checked_at_once() -> None:
    """The connection that a worker held broke, its port refuses, its ping is not answered: its jobs are taken back
    without a sweep."""
    queue, probe = FakeQueue(numbers={ONE: 1}), FakeProbe({URL: ProbeResult(ProbeStatus.SAME)})
    term = _term(queue, time.monotonic, probe)
    await term.register(_registration())
    await term.sweep()
    probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")
    await term.check("w", ONE)
    assert queue.reclaimed == [ONE]
    assert term.registry.find("w") is None


async def test_a_session_that_is_checked_twice_is_declared_dead_once() -> None:
    """Its connection breaks while the sweep checks it for its overdue heartbeats: it is one death."""
    declared_dead = asyncio.Event()

    class SlowAtFirst(FakeProbe):
        async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
            result = await super().ask(url, worker_id, session_id)
            if self.probes == seen + 1:
                await declared_dead.wait()
            return result

    seen = 1_000
    queue, clock, probe = FakeQueue(), Clock(), SlowAtFirst({URL: ProbeResult(ProbeStatus.SAME)})
    term = _term(queue, clock, probe)
    await term.register(_registration())
    await term.sweep()
    seen = probe.probes
    probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")
    clock.now += 5
    sweep = asyncio.create_task(term.sweep())
    await eventually(lambda: probe.probes > seen, "the sweep probes")
    await term.check("w", ONE)
    declared_dead.set()
    await sweep
    assert queue.reclaimed == [ONE]


@pytest.mark.parametrize("proof", ["its port", "its ping", "not verified", "another session", "unknown"])
async def test_a_broken_connection_alone_declares_nobody_dead(proof: str) -> None:
    """It is a hint that anybody may give: what counts is what the worker's port and its renewal counter say."""
    queue = FakeQueue(numbers={ONE: 1})
    probe = FakeProbe({URL: ProbeResult(ProbeStatus.UNKNOWN if proof == "not verified" else ProbeStatus.SAME)})
    term = _term(queue, time.monotonic, probe)
    await term.register(_registration())
    await term.sweep()
    if proof != "its port":
        probe.results[URL] = ProbeResult(ProbeStatus.REFUSED, "refuses")
    if proof == "its ping":
        queue.answers_pings.add(ONE)
    session = SessionId("w.0000000000000002") if proof == "another session" else ONE
    await term.check("outsider" if proof == "unknown" else "w", session)
    assert queue.reclaimed == []
    assert term.registry.find("w") is not None


async def test_pools_stay_known_while_they_are_served_or_declared() -> None:
    """Both are remembered anew from time to time, though somebody else ended the declaration; others are left alone."""
    queue, clock = FakeQueue(), Clock()
    term = _term(queue, clock, declared="d")
    await term.register(_registration())
    await term.save()
    assert queue.pools == {"m": False, "d": True}
    queue.pools = {Pool("d"): False, Pool("x"): True}
    clock.now += 599
    await term.save()
    assert queue.pools == {"d": False, "x": True}
    clock.now += 1
    await term.save()
    assert queue.pools == {"m": False, "d": True, "x": True}


async def test_a_snapshot_that_others_changed_is_written_again() -> None:
    """A late write of the Manager before, or a Redis that lost its latest writes, is mended within seconds."""
    queue, clock = FakeQueue(), Clock()
    term = _term(queue, clock)
    await term.register(_registration())
    await term.save()
    right = dict(queue.workers)
    stale = right["w"].model_copy(update={"models": ["gone"]})
    for wrong in ({}, {"w": stale}, right | {"ghost": stale.model_copy(update={"worker_id": "ghost"})}):
        queue.workers = dict(wrong)
        clock.now += SNAPSHOT_CHECK_S
        await term.save()
        assert queue.workers == right


async def test_sets_of_adapters_are_in_the_snapshot_while_a_worker_has_them() -> None:
    """Before the entry that names one; written again if lost, and removed once nobody has it."""
    queue, clock = FakeQueue(), Clock()
    term = _term(queue, clock)
    given = _registration().model_dump() | {"adapters": ["x", "y"], "adapter_room": 2}
    await term.register(Registration.model_validate(given))
    await term.save()
    [name] = queue.adapter_sets
    assert queue.adapter_sets == {name: frozenset({"x", "y"})}
    assert queue.workers["w"].adapter_set == name
    queue.adapter_sets.clear()
    clock.now += SNAPSHOT_CHECK_S
    await term.save()
    assert list(queue.adapter_sets) == [name]

    after = _term(queue, clock)
    await after.load()
    assert after.registry.get("w").adapters.names == {"x", "y"}
    await after.register(Registration.model_validate(given | {"adapters": ["x"]}))
    await after.save()
    other = queue.workers["w"].adapter_set
    assert set(queue.adapter_sets) == {name, other}
    clock.now += SNAPSHOT_CHECK_S
    await after.save()
    assert set(queue.adapter_sets) == {other}


async def test_a_worker_that_is_only_in_the_snapshot_keeps_no_newcomer_out() -> None:
    """A worker that left while no Manager acted looks, for a while, as if it had just registered: it was not heard."""
    queue, clock = FakeQueue(), Clock()
    before = _term(queue, clock)
    await before.register(_registration())
    await before.save()
    again = _registration().model_copy(update={"session_id": "w.0000000000000002"})
    with pytest.raises(WorkerIdTaken):
        await before.register(again)
    after = _term(queue, clock)
    await after.load()
    assert (await after.register(again)).session_id == again.session_id


def _heartbeat(**fields: object) -> Heartbeat:
    return Heartbeat.model_validate(_registration().model_dump(include=Heartbeat.model_fields.keys()) | fields)


async def test_only_entries_that_changed_are_written() -> None:
    """[G10] Of many workers the one that changed is written at once; how busy they are is written with the next sweep,
    and heartbeats that say nothing new cause no call at all."""
    queue, clock = FakeQueue(), Clock()
    term = _term(queue, clock)
    saved: list[list[str]] = []
    save_workers = queue.fleet.save_workers

    async def recording(changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None:
        changed, gone = list(changed), list(gone)
        saved.append([*(info.worker_id for info in changed), *gone])
        await save_workers(changed, gone)

    queue.fleet.save_workers = recording  # type: ignore[method-assign]
    for number in range(50):
        own = {"url": None, "worker_id": f"w{number}", "session_id": f"w{number}.{number:016x}"}
        await term.register(Registration.model_validate(_registration().model_dump() | own))
    await term.save()
    assert len(saved.pop()) == 50
    term.changed.clear()

    def beat(number: int, **fields: object) -> None:
        term.heartbeat(f"w{number}", _heartbeat(session_id=f"w{number}.{number:016x}", **fields))

    before = queue.round_trips
    for number in range(50):
        beat(number)
    assert not term.changed.is_set()
    beat(7, running=1)
    assert not term.changed.is_set()
    assert queue.round_trips == before
    await term.sweep()
    assert term.changed.is_set()
    await term.save()
    assert saved.pop() == ["w7"]
    beat(9, engine=EngineState.FAILED)
    assert term.changed.is_set()
    await term.save()
    term.leave("w3", f"w3.{3:016x}")
    await term.save()
    assert saved == [["w9"], ["w3"]]
    assert len(queue.workers) == 49


async def test_one_shard_that_is_away_does_not_stop_the_others() -> None:
    """[G8] Renewal numbers, deadlines and reclaims of the shards that answer go on; the dead's jobs on the other
    shard are taken back once that is back."""
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    term = _term(queue, clock)
    await _sweep_each_second(term, clock, 2)
    queue.away = {1}
    queue.swept.clear()
    await _sweep_each_second(term, clock, 20)
    assert term.unreachable_shards == {1}
    assert queue.reclaimed_on == [(0, ONE)]
    assert set(queue.swept) == {0}
    assert len(queue.swept) >= 18
    queue.away = set()

    async def back() -> bool:
        await term.sweep()
        return (1, ONE) in queue.reclaimed_on

    await eventually(back, "its jobs on the other shard are taken back", every_s=0.1)
    assert queue.swept[-1] == 1
    term.close()


async def test_a_shard_comes_back_after_an_unforeseen_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is away is polled until it answers, also after a poll that failed with an error of another kind."""
    monkeypatch.setattr(shard_sweeps, "_POLL_UNREACHABLE", Backoff(0.01, 0.01))
    queue, clock = FakeQueue(numbers={ONE: 1}), Clock()
    term = _term(queue, clock)
    queue.away = {1}
    await term.sweep()
    assert term.unreachable_shards == {1}
    failed: list[int] = []
    read = queue.renewal_counters

    async def broken(shard: int) -> dict[SessionId, int]:
        if shard == 1 and not failed:
            failed.append(shard)
            raise ValueError("a reply that nobody foresaw")
        return await read(shard)

    monkeypatch.setattr(queue, "renewal_counters", broken)
    await eventually(lambda: bool(failed), "it is polled")
    queue.away = set()
    await eventually(lambda: term.unreachable_shards == set(), "it is back")
    term.close()
