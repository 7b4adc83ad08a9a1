"""Which process of a port leaves a new connection to another."""

from __future__ import annotations

from router.processes.connection_counts import YIELD_S, ConnectionCounts


def test_the_fuller_process_yields() -> None:
    """One with clearly more connections than another waits; equals, and the emptiest, do not."""
    counts = ConnectionCounts(3)
    first, second, third = (counts.pause_of(number) for number in (1, 2, 3))
    assert [second(10), third(9), first(9)] == [0, 0, 0]
    assert first(30) == YIELD_S
    assert second(11) == 0
    assert second(100) == YIELD_S


def test_nobody_waits_for_a_process_that_does_not_run() -> None:
    """One that has not started to accept, or has ended, counts for nobody."""
    counts = ConnectionCounts(2)
    first, second = counts.pause_of(1), counts.pause_of(2)
    assert first(50) == 0
    assert second(0) == 0
    assert first(50) == YIELD_S
    counts.gone(2)
    assert first(50) == 0
