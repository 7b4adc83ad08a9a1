"""Whether a worker sweeps in place of the Manager."""

from __future__ import annotations

from collections.abc import Callable

from queue_schemas import SessionId
from worker.core import FallbackWatch

PEER = SessionId("w.0000000000000001")
LEASE_S = 15.0


def poll_each_second(
    watch: FallbackWatch, begin: int, end: int, manager: Callable[[int], int], peer: Callable[[int], int] = int
) -> list[int]:
    """Poll as a worker does; the seconds at which the peer's jobs were to be reclaimed."""
    declared_dead = []
    for second in range(begin, end):
        watched = watch.saw_manager(manager(second), second, second + 0.01)
        if watched:
            watch.saw_peers({PEER: peer(second)}, second, second + 0.01)
            if watch.dead_peers():
                declared_dead.append(second)
    return declared_dead


def still(_: int) -> int:
    return 7


def test_while_a_manager_acts_nobody_sweeps() -> None:
    """A lease that is extended now and then is enough, however the peers are."""
    watch = FallbackWatch(LEASE_S)
    assert poll_each_second(watch, 0, 100, lambda second: second // 6, still) == []
    assert not watch.manager_absent


def test_after_a_lease_without_a_manager_the_dead_are_reclaimed() -> None:
    """A worker that died with the Manager is found a lease later, not two."""
    watch = FallbackWatch(LEASE_S)
    declared_dead = poll_each_second(watch, 0, 20, still, still)
    assert declared_dead[0] in (16, 17)
    assert watch.manager_absent


def test_without_a_manager_the_living_are_left_alone() -> None:
    """A counter that rises is a worker that lives."""
    watch = FallbackWatch(LEASE_S)
    assert poll_each_second(watch, 0, 100, still) == []
    assert watch.manager_absent


def test_a_manager_that_comes_back_ends_it() -> None:
    """At the first poll that finds its lease extended."""
    watch = FallbackWatch(LEASE_S)
    poll_each_second(watch, 0, 20, still)
    assert poll_each_second(watch, 20, 40, int, still) == []
    assert not watch.manager_absent


def test_time_without_redis_does_not_count() -> None:
    """After an outage both leases are watched anew."""
    watch = FallbackWatch(LEASE_S)
    poll_each_second(watch, 0, 14, still, still)
    watch.restart()
    assert poll_each_second(watch, 14, 29, still, still) == []
