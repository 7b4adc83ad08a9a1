"""Lanes and bands: urgent first, and nothing starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import BANDS, DEFAULT_BAND, LANES, Lane
from queue_schemas.lanes import (
    BAND_STEP,
    LANE_CYCLE,
    REGIONAL_STARVATION_BOUND,
    STARVATION_BOUND,
    band_of_priority,
    band_order,
    lane_order,
    region_first,
)

turns = st.integers(0, 2**40)


@given(turns)
def test_every_turn_considers_every_lane_and_band_once(turn: int) -> None:
    """An order is a permutation: what waits is found whatever the turn."""
    assert sorted(lane_order(turn)) == sorted(LANES)
    assert sorted(band_order(turn)) == list(range(BANDS))


@given(turns)
def test_interactive_work_goes_first_most_of_the_time(turn: int) -> None:
    """In every cycle all turns but two begin with interactive work, one each with the other lanes."""
    firsts = [lane_order(turn + step)[0] for step in range(LANE_CYCLE)]
    assert firsts.count(Lane.INTERACTIVE) == LANE_CYCLE - 2
    assert firsts.count(Lane.BACKGROUND) == firsts.count(Lane.BATCH) == 1


@given(turns)
def test_urgent_bands_go_first_most_of_the_time(turn: int) -> None:
    """In any run of turns three of four begin with band 0, and each other band gets its share of the rest."""
    window = BAND_STEP * (BANDS - 1)
    firsts = [band_order(turn + step)[0] for step in range(window)]
    assert firsts.count(0) == window - (BANDS - 1)
    assert all(firsts.count(band) == 1 for band in range(1, BANDS))


@pytest.mark.parametrize("lane", list(LANES))
@pytest.mark.parametrize("band", range(BANDS))
@given(start=st.integers(0, 10**6), offset=st.integers(0, 10**6))
def test_no_lane_and_band_waits_longer_than_the_bound(lane: Lane, band: int, start: int, offset: int) -> None:
    """Wherever a worker's and a lane's counters stand, this lane and band comes first together within the bound.

    The lane's own counter moves only when one of its jobs is claimed, which is what happens when the lane goes first.
    """
    lane_turn = offset
    for claims in range(1, STARVATION_BOUND + 1):
        if lane_order(start + claims - 1)[0] is lane:
            if band_order(lane_turn)[0] == band:
                return
            lane_turn += 1
    pytest.fail(f"{lane} band {band} did not come first within {STARVATION_BOUND} claims")


@given(st.integers(-(2**31), 2**31))
def test_lower_priority_numbers_are_more_urgent(priority: int) -> None:
    """The band never rises with urgency, and the default priority has the default band."""
    assert 0 <= band_of_priority(priority) < BANDS
    assert band_of_priority(priority - 1) <= band_of_priority(priority)
    assert band_of_priority(0) == DEFAULT_BAND


def _first_place(turn: int) -> tuple[Lane, str]:
    """Where the ``turn``-th job of a worker that has a region is looked for first."""
    lane = lane_order(turn)[0]
    return lane, "of the region" if region_first(turn) else "of none"


@pytest.mark.parametrize("lane", list(LANES))
@pytest.mark.parametrize("kind", ["of the region", "of none"])
@pytest.mark.parametrize("band", range(BANDS))
@given(start=turns, offset=turns)
def test_no_place_waits_longer_than_the_regional_bound(
    lane: Lane, kind: str, band: int, start: int, offset: int
) -> None:
    """Of the region or anybody's, every lane and band comes first within the bound, whatever the counters."""
    place_turn = offset
    for claims in range(REGIONAL_STARVATION_BOUND):
        if _first_place(start + claims) == (lane, kind):
            if band_order(place_turn)[0] == band:
                return
            place_turn += 1
    raise AssertionError("it never came first")
