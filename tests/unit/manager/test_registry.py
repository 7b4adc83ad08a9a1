import pytest

from manager.core import ProbeResult, ProbeStatus, Registry
from queue_schemas import (
    Assignment,
    EngineState,
    Heartbeat,
    Registration,
    SessionId,
    UnknownWorker,
    WorkerState,
    shard_of_pool,
)

ONE, TWO = "w.0000000000000001", "w.0000000000000002"


def _registry(term: int = 1) -> Registry:
    return Registry(term, lambda pool: shard_of_pool(pool, 1), unresponsive_s=6.0, lease_s=15.0)


def _registration(session_id: str = ONE, **fields: object) -> Registration:
    given = {"models": ["m"], "slots": 4, "engine": EngineState.READY, "url": "http://127.0.0.1:1"} | fields
    return Registration.model_validate({"worker_id": "w", "session_id": session_id, **given})


def _heartbeat(session_id: str = ONE, **fields: object) -> Heartbeat:
    given = {"models": ["m"], "slots": 4, "engine": EngineState.READY} | fields
    return Heartbeat.model_validate({"session_id": session_id, **given})


def test_a_worker_that_joins_is_assigned_its_models() -> None:
    """The first answer already says what to pull, under this term."""
    member = _registry(term=3).join(_registration(), 0.0)
    assert [pool.pool for pool in member.assignment.pools] == ["m"]
    assert member.assignment.term == 3
    assert member.info(2.0).heartbeat_age_ms == 2000
    assert member.info().takes_work


def test_heartbeats_of_unregistered_sessions_are_unknown() -> None:
    """An id nobody registered, and a session that is not the member's, must register again."""
    registry = _registry()
    with pytest.raises(UnknownWorker):
        registry.heartbeat("w", _heartbeat(), 0.0)
    registry.join(_registration(), 0.0)
    with pytest.raises(UnknownWorker, match="register again"):
        registry.heartbeat("w", _heartbeat(TWO), 0.0)


def test_an_engine_that_gets_ready_is_assigned_then() -> None:
    """While the engine starts nothing is assigned; the heartbeat that says ready is answered with the queues."""
    registry = _registry()
    assert registry.join(_registration(engine=EngineState.STARTING), 0.0).assignment.pools == []
    member = registry.heartbeat("w", _heartbeat(), 1.0)
    assert [pool.pool for pool in member.assignment.pools] == ["m"]
    assert registry.heartbeat("w", _heartbeat(running=3), 2.0).assignment is member.assignment


def test_a_worker_that_does_not_reach_redis_is_not_counted_on() -> None:
    """It is registered and heard, but would claim nothing: whoever asks who serves its models is not told of it."""
    registry = _registry()
    assert not registry.join(_registration(broker_ok=False), 0.0).info().takes_work
    assert registry.heartbeat("w", _heartbeat(), 1.0).info().takes_work
    assert not registry.heartbeat("w", _heartbeat(broker_ok=False), 2.0).info().takes_work


def test_missed_heartbeats_make_suspect_and_one_clears_it() -> None:
    """An unresponsive worker keeps its assignment and is active again with the next heartbeat."""
    registry = _registry()
    before = registry.join(_registration(), 0.0)
    registry.sweep(5.9, lambda _: True)
    assert registry.get("w").state is WorkerState.ACTIVE
    registry.sweep(6.0, lambda _: True)
    unresponsive = registry.get("w")
    assert unresponsive.state is WorkerState.UNRESPONSIVE
    assert not unresponsive.info().takes_work
    assert unresponsive.assignment == before.assignment
    assert registry.heartbeat("w", _heartbeat(), 7.0).state is WorkerState.ACTIVE


def test_a_suspect_without_renewal_number_is_forgotten() -> None:
    """Who has no number holds no job and is dropped after a lease; who has one is left to the watch of its lease."""
    registry = _registry()
    registry.join(_registration(), 0.0)
    assert registry.sweep(20.9, lambda _: False) == []
    assert registry.sweep(21.0, lambda _: True) == []
    assert [member.worker_id for member in registry.sweep(21.0, lambda _: False)] == ["w"]
    assert registry.find("w") is None


def test_draining_is_for_good() -> None:
    """A drained worker is assigned nothing, also when it registers again; only a new session id works again."""
    registry = _registry()
    registry.join(_registration(), 0.0)
    assert registry.drain("w", 1.0).assignment.pools == []
    assert registry.join(_registration(), 2.0).state is WorkerState.DRAINING
    assert registry.heartbeat("w", _heartbeat(), 3.0).drain_asked
    fresh = registry.join(_registration(TWO), 4.0)
    assert (fresh.state, [pool.pool for pool in fresh.assignment.pools]) == (WorkerState.ACTIVE, ["m"])
    with pytest.raises(UnknownWorker):
        registry.drain("nobody", 0.0)


def test_a_worker_that_drains_by_itself_is_draining() -> None:
    """SIGTERM at the worker shows here through its heartbeat, without being asked for."""
    registry = _registry()
    registry.join(_registration(), 0.0)
    member = registry.heartbeat("w", _heartbeat(draining=True), 1.0)
    assert (member.state, member.drain_asked) == (WorkerState.DRAINING, False)


def test_leaving_needs_the_right_session() -> None:
    """A late deregistration of an earlier session does not remove the present one."""
    registry = _registry()
    registry.join(_registration(TWO), 0.0)
    assert not registry.leave("w", ONE)
    assert registry.leave("w", TWO)
    assert not registry.leave("w", TWO)


def test_the_dead_are_forgotten_by_session() -> None:
    """Declaring a session dead leaves a newer one of the same id alone."""
    registry = _registry()
    registry.join(_registration(TWO), 0.0)
    assert registry.declare_dead(SessionId(ONE)) is None
    declared_dead = registry.declare_dead(SessionId(TWO))
    assert declared_dead is not None and declared_dead.worker_id == "w"
    assert registry.members() == []


def test_a_url_is_verified_by_an_answer_only() -> None:
    """Until the URL answered as this session it is probed again, ever more rarely, with a note for people."""
    registry = _registry()
    member = registry.join(_registration(), 0.0)
    assert registry.to_verify(0.0, 5) == [member]
    registry.record_probe(member.session_id, ProbeResult(ProbeStatus.OTHER, "answered by worker 'x'"), 0.0)
    assert registry.get("w").info().url_note == "answered by worker 'x'"
    assert registry.to_verify(0.5, 5) == []
    assert len(registry.to_verify(1.0, 5)) == 1
    assert registry.overdue(100.0, 4.0, 5) == []
    registry.record_probe(member.session_id, ProbeResult(ProbeStatus.SAME), 1.0)
    assert registry.get("w").info().url_note == ""
    assert registry.to_verify(100.0, 5) == []
    assert len(registry.overdue(100.0, 4.0, 5)) == 1
    assert registry.overdue(3.9, 4.0, 5) == []


def test_registering_again_keeps_what_is_known() -> None:
    """The same session at the same URL stays verified; at another URL it is probed anew."""
    registry = _registry()
    member = registry.join(_registration(), 0.0)
    registry.record_probe(member.session_id, ProbeResult(ProbeStatus.SAME), 0.0)
    registry.saw_counters([member.session_id])
    again = registry.join(_registration(), 1.0)
    assert (again.verified, again.had_counter, again.assignment) == (True, True, member.assignment)
    moved = registry.join(_registration(url="http://127.0.0.1:2"), 2.0)
    assert (moved.verified, moved.had_counter) == (False, True)


def test_a_snapshot_restores_the_fleet_under_a_new_term() -> None:
    """A new Manager begins with everybody just heard, the same content under its own term, and drains remembered."""
    old = _registry(term=1)
    old.join(_registration(), 0.0)
    old.join(_registration(worker_id="d", session_id="d.0000000000000003"), 0.0)
    old.drain("d", 0.0)
    new = _registry(term=2)
    new.load([member.info() for member in old.members()], 1000.0)
    draining, working = new.members()
    assert working.state is WorkerState.ACTIVE
    assert working.assignment.order > old.get("w").assignment.order
    assert working.assignment.pools == old.get("w").assignment.pools
    assert working.info(1001.0).heartbeat_age_ms == 1000
    assert not working.verified
    assert draining.drain_asked and draining.state is WorkerState.DRAINING


def _several(loaded: str = "a", **fields: object) -> Registration:
    return _registration(models=[loaded], loaded=loaded, loadable=["a", "b"], **fields)


def _of(loaded: str, **fields: object) -> Heartbeat:
    models = [loaded] if fields.get("engine") is None else []
    return _heartbeat(models=models, loaded=loaded, **fields)


def _pulls(assignment: Assignment) -> tuple[str, list[str]]:
    return assignment.load, [pool.pool for pool in assignment.pools]


def test_a_worker_that_is_told_to_load_pulls_nothing_until_it_serves_that() -> None:
    """From the decision on, through the end of the old engine, until the new one is ready: each step is one version."""
    registry = _registry()
    first = registry.join(_several(), 0.0)
    assert _pulls(first.assignment) == ("", ["a"])
    told = registry.place("w", "b", 10.0)
    assert _pulls(told.assignment) == ("b", [])
    assert told.assignment.version == first.assignment.version + 1
    assert not told.info().takes_work  # though its engine is ready
    assert registry.heartbeat("w", _of("a", running=3), 11.0).assignment is told.assignment
    loading = registry.heartbeat("w", _of("b", engine=EngineState.STARTING), 12.0)
    assert loading.assignment is told.assignment
    assert (loading.load_s, loading.load_failed) == (None, False)
    ready = registry.heartbeat("w", _of("b"), 40.0)
    assert (_pulls(ready.assignment), ready.load_s) == (("b", ["b"]), 30.0)
    assert ready.info().takes_work
    again = registry.join(_several("b"), 50.0)
    assert (_pulls(again.assignment), again.told_at, again.load_s) == (("b", ["b"]), 10.0, 30.0)


def test_another_model_is_another_version() -> None:
    """Though neither assignment names a pool."""
    registry = _registry()
    registry.join(_several(), 0.0)
    told = registry.place("w", "b", 1.0).assignment
    assert registry.place("w", "a", 2.0).assignment.order > told.order
    other = registry.place("w", "c", 3.0).assignment
    assert registry.place("w", "b", 4.0).assignment.order > other.order > told.order


def test_a_load_that_fails_is_told_from_a_later_crash() -> None:
    """Only an engine that was never ready with its model failed to load it."""
    registry = _registry()
    assert registry.join(_several(engine=EngineState.FAILED), 0.0).load_failed
    assert not registry.heartbeat("w", _of("a"), 1.0).load_failed
    assert not registry.heartbeat("w", _of("a", engine=EngineState.FAILED), 2.0).load_failed
    assert not registry.place("w", "b", 3.0).load_failed
    assert registry.heartbeat("w", _of("b", engine=EngineState.FAILED), 4.0).load_failed


def test_what_a_worker_loads_survives_the_manager() -> None:
    """The next term assigns the same model, also in the midst of a swap; a new session of the worker is told none."""
    registry = _registry()
    registry.join(_several(), 0.0)
    told = registry.place("w", "b", 1.0)
    following = _registry(term=2)
    following.load([told.info()], 100.0)
    member = following.get("w")
    assert (_pulls(member.assignment), member.assignment.term) == (("b", []), 2)
    assert (member.loadable, member.told_at, member.load_s) == (("a", "b"), 100.0, None)
    registry.heartbeat("w", _of("b"), 9.0)
    following.load([registry.get("w").info()], 100.0)
    assert _pulls(following.get("w").assignment) == ("b", ["b"])
    assert following.get("w").load_s == 0.0
    assert _pulls(following.join(_several(session_id=TWO), 101.0).assignment) == ("", ["a"])


def test_fleets_without_installed_models_write_what_they_did() -> None:
    """No field more in an assignment, a registration, a heartbeat or an entry of the snapshot."""
    member = _registry().join(_registration(), 0.0)
    texts = [member.info().model_dump_json(), _registration().model_dump_json(), _heartbeat().model_dump_json()]
    assert not [text for text in texts if '"load' in text]
