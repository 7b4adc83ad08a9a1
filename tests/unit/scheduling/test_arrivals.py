"""How fast jobs come: exact for a steady stream however far apart looks are, and never less than nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.arrivals import WINDOW_MS, Arrivals

NONE = Arrivals()


def steady(per_s: int, seconds: int, arrivals: Arrivals = NONE) -> Arrivals:
    """So many jobs come each second, with a look at the end of each."""
    for _ in range(seconds):
        arrivals = arrivals.looked_at(arrivals.total + per_s, 1_000)
    return arrivals


@pytest.mark.parametrize("per_s", [1, 7, 5_000])
def test_a_steady_stream_is_told_as_what_it_is(per_s: int) -> None:
    """After some half minutes; after the first, as six tenths of it."""
    assert steady(per_s, 300).per_s == pytest.approx(per_s, rel=0.01)
    assert steady(per_s, 30).per_s == pytest.approx(per_s * 0.63, rel=0.02)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=50))
def test_it_is_the_same_however_far_apart_looks_are(gaps_s: list[int]) -> None:
    """A sweeper that was away for minutes changes nothing of a steady stream."""
    arrivals = steady(10, 600)
    for gap_s in gaps_s:
        arrivals = arrivals.looked_at(arrivals.total + 10 * gap_s, gap_s * 1_000)
        assert arrivals.per_s == pytest.approx(10, rel=0.01)


def test_a_burst_counts_over_the_window_and_is_forgotten() -> None:
    """Three hundred jobs in a second are ten a second over half a minute, and nothing after some."""
    burst = steady(0, 60).looked_at(300, 1_000)
    assert burst.per_s == pytest.approx(300 / 31, rel=0.01)
    later = steady(0, 60, burst)
    assert later.per_s == pytest.approx(burst.per_s * 0.14, rel=0.02)
    assert steady(0, 400, later).per_s == 0.0


@given(st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 2**45)), max_size=30))
def test_it_stays_a_number_whatever_the_counts_are(looks: list[tuple[int, int]]) -> None:
    """Counts that go back, clocks that stand still or leap: never below nothing, never more than ever came."""
    arrivals = Arrivals()
    for total, passed_ms in looks:
        arrivals = arrivals.looked_at(total, passed_ms)
        assert 0 <= arrivals.per_s <= sum(one for one, _ in looks) * 1_000 / WINDOW_MS + 1
