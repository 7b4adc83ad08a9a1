"""Whose lease is over."""

from __future__ import annotations

from queue_schemas import SessionId, ShardedLeaseWatch
from queue_schemas.fleet.lease_watch import LeaseWatch

A, B = SessionId("a.0000000000000001"), SessionId("b.0000000000000002")
LEASE_S = 15.0


def _poll(watch: LeaseWatch, numbers: dict[SessionId, int], begin: int, end: int) -> list[list[SessionId]]:
    """A poll a second, each answered after 10 ms."""
    return [watch.observe(numbers, float(second), second + 0.01) for second in range(begin, end)]


def test_a_number_that_stands_still_for_a_whole_lease_is_dead() -> None:
    """Not a poll earlier than a lease after the last change was seen."""
    found = _poll(LeaseWatch(LEASE_S), {A: 4}, 0, 18)
    assert found[:16] == [[]] * 16
    assert found[16:] == [[A], [A]]


def test_a_number_that_moves_lives_on() -> None:
    """One renewal within the lease begins the watch anew; another session_id's stillness is its own."""
    watch = LeaseWatch(LEASE_S)
    _poll(watch, {A: 1, B: 1}, 0, 14)
    found = _poll(watch, {A: 2, B: 1}, 14, 18)
    assert found[-1] == [B]


def test_time_without_redis_does_not_count() -> None:
    """After an outage the whole lease is watched again."""
    watch = LeaseWatch(LEASE_S)
    _poll(watch, {A: 1}, 0, 15)
    watch.restart()
    assert not any(_poll(watch, {A: 1}, 15, 31))
    assert _poll(watch, {A: 1}, 31, 32) == [[A]]


def test_a_manager_that_slept_starts_over() -> None:
    """A gap between polls (a paused process or machine) says nothing about the workers."""
    watch = LeaseWatch(LEASE_S)
    _poll(watch, {A: 1}, 0, 10)
    assert watch.observe({A: 1}, 100.0, 100.01) == []
    assert not any(_poll(watch, {A: 1}, 101, 115))


def test_a_slow_poll_never_shortens_the_lease() -> None:
    """Stillness counts from the answer that showed the number to the question of the last poll."""
    watch = LeaseWatch(LEASE_S)
    watch.observe({A: 1}, 0.0, 3.0)
    found = [watch.observe({A: 1}, second, second + 0.9) for second in (7.0, 11.0, 15.5, 17.9)]
    assert found == [[]] * 4
    assert watch.observe({A: 1}, 18.9, 19.0) == [A]


def test_an_incarnation_without_a_number_is_not_watched() -> None:
    """What has left or was reclaimed is forgotten; membership tells who has a number."""
    watch = LeaseWatch(LEASE_S)
    _poll(watch, {A: 1}, 0, 10)
    assert A in watch
    _poll(watch, {}, 10, 11)
    assert A not in watch
    assert not any(_poll(watch, {A: 1}, 11, 20))


def test_a_shard_that_is_away_has_no_say() -> None:
    """[G8] Who renews on any shard that answers is alive; who stands still on all that answer is not; and a shard that
    comes back is watched for a lease before anybody is missed there."""
    watch = ShardedLeaseWatch(LEASE_S, 2)
    for second in range(60):
        watch.observe(0, {A: 4, B: 7}, second, second)
        if second < 30:
            watch.mark_unreachable(1)
        else:
            watch.observe(1, {A: second, B: 9}, second, second)
        if second in (20, 46):
            assert watch.expired_sessions() == ([A, B] if second == 20 else [B])
        if second == 31:
            assert watch.expired_sessions() == []
