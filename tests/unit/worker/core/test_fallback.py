"""Whether a worker stands in for the Manager."""

from __future__ import annotations

from collections.abc import Callable

from queue_schemas import SessionId
from worker.core import FallbackSweep

PEER = SessionId("w.0000000000000001")
LEASE_S = 15.0


def look_each_second(
    state: FallbackSweep, begin: int, end: int, manager: Callable[[int], int], peer: Callable[[int], int] = int
) -> list[int]:
    """Look as a worker does; the seconds at which the peer was to be taken back."""
    declared_dead = []
    for second in range(begin, end):
        watched = state.saw_manager(manager(second), second, second + 0.01)
        if watched:
            state.saw_peers({PEER: peer(second)}, second, second + 0.01)
            if state.dead_peers():
                declared_dead.append(second)
    return declared_dead


def still(_: int) -> int:
    return 7


def test_while_a_manager_acts_nobody_stands_in() -> None:
    """A lease that is extended now and then is enough, however the peers are."""
    state = FallbackSweep(LEASE_S)
    assert look_each_second(state, 0, 100, lambda second: second // 6, still) == []
    assert not state.acting


def test_after_a_lease_without_a_manager_the_dead_are_taken_back() -> None:
    """Whoever died with the Manager is missed a lease later, not two."""
    state = FallbackSweep(LEASE_S)
    declared_dead = look_each_second(state, 0, 20, still, still)
    assert declared_dead[0] in (16, 17)
    assert state.acting


def test_without_a_manager_the_living_are_left_alone() -> None:
    """A number that rises is a worker that lives."""
    state = FallbackSweep(LEASE_S)
    assert look_each_second(state, 0, 100, still) == []
    assert state.acting


def test_a_manager_that_comes_back_ends_it() -> None:
    """At the first look that finds its number risen."""
    state = FallbackSweep(LEASE_S)
    look_each_second(state, 0, 20, still)
    assert look_each_second(state, 20, 40, int, still) == []
    assert not state.acting


def test_time_without_redis_counts_for_nobody() -> None:
    """After an outage both leases are watched anew."""
    state = FallbackSweep(LEASE_S)
    look_each_second(state, 0, 14, still, still)
    state.restart()
    assert look_each_second(state, 14, 29, still, still) == []
