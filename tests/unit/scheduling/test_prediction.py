"""How fast jobs were served of late: newer ones count more, and age takes weight, not the mean. And what goes before a
job that waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas.lanes import BAND_CYCLE, BAND_STEP, BANDS, Lane, band_order
from scheduling.prediction import FADE_MS, KNOWN_JOBS, RATE_JOBS, RETRIED, LaneState, Rate, place_of


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


def jobs_ahead(bands: list[int], band: int, cost: int = 10) -> int | None:
    """Of the last of those that wait in ``band``, by one tenant."""
    costs = tuple(cost * bands.count(one) for one in range(RETRIED, BANDS))
    state = LaneState(len(bands), costs, 1, served(Rate(), KNOWN_JOBS, 100, 0))
    return place_of({Lane.INTERACTIVE: state}, Lane.INTERACTIVE, band, max(bands.count(band) - 1, 0), 1).jobs_ahead


def served_at(bands: list[int]) -> dict[int, int]:
    """When the last job of each band is claimed, by the order of bands."""
    left, ends = {band: bands.count(band) for band in range(BANDS)}, {}
    for turn in range(len(bands)):
        band = next(one for one in band_order(turn) if left[one])
        left[band] -= 1
        ends[band] = turn
    return ends


@given(st.lists(st.integers(0, BANDS - 1), min_size=1, max_size=400))
def test_the_bands_before_go_first_but_for_turns(bands: list[int]) -> None:
    """Within a cycle and a tenth of what claims do."""
    for band, turn in served_at(bands).items():
        ahead = jobs_ahead(bands, band)
        assert ahead is not None
        assert abs(ahead - turn) <= BAND_CYCLE + 0.1 * turn


def test_a_job_behind_a_flood_of_urgent_ones_waits_for_its_turn() -> None:
    """It is the first of its band: it has every twelfth claim."""
    assert jobs_ahead([0] * 5, 2) == jobs_ahead([0] * 5, 3) == 5
    assert jobs_ahead([0] * 5_000 + [2], 2) == BAND_CYCLE - 1
    assert jobs_ahead([0] * 5_000 + [2] * 11, 2) == pytest.approx(11 * BAND_CYCLE, abs=BAND_CYCLE)
    assert jobs_ahead([3] * 5_000 + [2], 2) == 0


@pytest.mark.parametrize("retried", [1, 3, 4, 11, 40])
@pytest.mark.parametrize("band", [0, 2])
def test_new_jobs_have_every_fourth_turn_before_retried_ones(retried: int, band: int) -> None:
    """As ``claim.lua`` takes them: retried work first but on the last of ``BAND_STEP`` turns."""
    turns = [turn % BAND_STEP == BAND_STEP - 1 for turn in range(retried + 1)]
    first = turns.index(True) if True in turns[:retried] else retried
    ahead = jobs_ahead([RETRIED] * retried, band)
    assert ahead is not None
    assert abs(ahead - first) <= 1
    behind = jobs_ahead([RETRIED] * retried + [band] * 40, RETRIED)
    assert behind is not None
    assert behind == pytest.approx((retried - 1) * BAND_STEP / (BAND_STEP - 1), abs=1)


def test_a_lane_that_says_nothing_of_its_cost_is_not_divided_by() -> None:
    """As counters that were lost may."""
    state = LaneState(5, (0,) * (1 + BANDS), 1, served(Rate(), KNOWN_JOBS, 100, 0))
    assert place_of({Lane.BATCH: state}, Lane.BATCH, 2, 5, 1).jobs_ahead == 0
