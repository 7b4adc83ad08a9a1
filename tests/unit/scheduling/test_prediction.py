"""How fast jobs were served of late: newer ones count more, and age takes weight, not the mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.prediction import FADE_MS, KNOWN_JOBS, RATE_JOBS, Rate


def served(rate: Rate, jobs: int, run_ms: int, at_ms: int) -> Rate:
    """So many jobs of ten units end that came at ``at_ms``."""
    for _ in range(jobs):
        rate = rate.observed(run_ms, 10, at_ms)
    return rate


def test_nothing_is_known_before_a_job_has_ended() -> None:
    assert (Rate().ms_per_job, Rate().ms_per_cost) == (None, None)
    assert (served(Rate(), 1, 50, 5).ms_per_job, served(Rate(), 1, 50, 5).ms_per_cost) == (50.0, 5.0)


def test_without_a_pause_it_forgets_by_jobs() -> None:
    """As many as it remembers leave a third of what was before."""
    rate = served(served(Rate(), 200, 9_000, 1_000), RATE_JOBS, 1_000, 1_000)
    assert rate.jobs == RATE_JOBS
    assert rate.ms_per_job == pytest.approx(1_000 + 8_000 * 0.365, rel=0.02)


def test_a_pause_lets_new_jobs_count_sooner() -> None:
    """After an hour eight jobs are left, so eight new ones weigh as much; after ten seconds nearly all are."""
    old = served(Rate(), 200, 9_000, 1_000)
    assert served(old, KNOWN_JOBS, 1_000, 3_600_000).ms_per_job == pytest.approx(5_000)
    assert served(old, KNOWN_JOBS, 1_000, 1_000 + FADE_MS).ms_per_job == pytest.approx(8_060, rel=0.02)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**9), st.integers(0, 2**41)), max_size=80))
def test_a_mean_lies_between_what_was_seen(jobs: list[tuple[int, int, int]]) -> None:
    """Whatever order jobs came in, and for as long as nobody ended one."""
    rate = Rate()
    for run_ms, cost, at_ms in jobs:
        rate = rate.observed(run_ms, cost, at_ms)
        assert 1 <= rate.jobs <= RATE_JOBS
        assert rate.ms_per_job is not None
        runs = [one for one, *_ in jobs]
        assert min(runs) - 2 <= rate.ms_per_job <= max(runs) + 2
