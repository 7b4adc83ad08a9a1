"""Who of a pool's workers counts: the driver's list beside the registry's."""

from __future__ import annotations

from inferq.autoscale.roster import Roll, Roster
from queue_schemas import EngineState, WorkerState
from tests.unit.inferq.autoscale.scene import FakeFabric


def roster() -> Roster:
    return Roster("m", start_timeout_ms=100_000, stop_timeout_ms=10_000)


def call(roster: Roster, owned: set[str], fabric: FakeFabric, now_ms: float) -> Roll:
    return roster.call(frozenset(owned), fabric.registry.values(), now_ms)


def test_the_registry_says_who_is_ready_and_the_driver_who_is_there() -> None:
    """One that serves another model is not ready for this one; one that the driver forgot is foreign."""
    fabric, one = FakeFabric(), roster()
    fabric.join("ready", running=2)
    fabric.join("engine", engine=EngineState.STARTING)
    fabric.join("other")
    fabric.registry["other"] = fabric.registry["other"].model_copy(update={"models": ["n"]})
    fabric.join("foreign")
    roll = call(one, {"ready", "engine", "other", "unknown"}, fabric, 0)
    assert (roll.ready, roll.foreign) == ({"ready"}, {"foreign"})
    assert roll.starting == {"engine", "other", "unknown"}
    assert roll.size == 5
    assert {worker.worker_id: (worker.running, worker.ready) for worker in roll.candidates} == {
        "ready": (2, True), "engine": (0, False), "other": (0, False), "unknown": (0, False)
    }  # fmt: skip


def test_one_that_was_ready_has_its_time_to_come_back() -> None:
    """An engine that is restarted is no missing worker at once, however old it is."""
    fabric, one = FakeFabric(), roster()
    fabric.join("w")
    call(one, {"w"}, fabric, 0)
    fabric.join("w", engine=EngineState.STARTING)
    assert call(one, {"w"}, fabric, 500_000).starting == {"w"}
    assert call(one, {"w"}, fabric, 599_999).starting == {"w"}
    assert call(one, {"w"}, fabric, 600_000).missing == {"w"}


def test_whoever_drains_leaves_whoever_said_so() -> None:
    """An operator, or the worker itself on SIGTERM; one that does not leave is stuck."""
    fabric, one = FakeFabric(), roster()
    fabric.join("w")
    fabric.registry["w"] = fabric.registry["w"].model_copy(update={"state": WorkerState.DRAINING})
    roll = call(one, {"w"}, fabric, 0)
    assert (roll.leaving, roll.size, roll.stuck) == ({"w"}, 0, frozenset())
    assert call(one, {"w"}, fabric, 10_000).stuck == {"w"}
    del fabric.registry["w"]
    assert call(one, {"w"}, fabric, 10_001).leaving == {"w"}, "until the driver says that it is gone"
    assert call(one, set(), fabric, 10_002).owned == frozenset()
    fabric.join("w")
    assert call(one, {"w"}, fabric, 10_003).ready == {"w"}, "a new one of its name starts anew"


def test_only_starts_that_were_seen_are_timed() -> None:
    """Not those of workers that were there before, nor of those that were ready when they were first seen."""
    fabric, one = FakeFabric(), roster()
    fabric.join("adopted")
    call(one, {"adopted"}, fabric, 0)
    assert one.start_up_ms == 0
    call(one, {"adopted", "a"}, fabric, 1_000)
    fabric.join("a")
    call(one, {"adopted", "a"}, fabric, 61_000)
    assert one.start_up_ms == 60_000
    for name in "bcd":
        fabric.join(name)
    call(one, {"adopted", *"abcd"}, fabric, 62_000)
    assert one.start_up_ms == 60_000


def test_one_that_was_told_to_load_another_model_is_not_ended_for_it() -> None:
    """It runs the jobs of that one: it neither counts here nor is among those to go, until it comes back."""
    fabric, one = FakeFabric(), roster()
    fabric.join("w", running=4)
    lent = {"models": ["n"], "loadable": ["m", "n"]}
    at_home, fabric.registry["w"] = fabric.registry["w"], fabric.registry["w"].model_copy(update=lent)
    for now_ms in (0, 500_000):
        roll = call(one, {"w"}, fabric, now_ms)
        assert (roll.lent, roll.size, roll.owned, roll.candidates) == ({"w"}, 0, {"w"}, ())
    fabric.registry["w"] = at_home
    assert call(one, {"w"}, fabric, 500_001).ready == {"w"}
