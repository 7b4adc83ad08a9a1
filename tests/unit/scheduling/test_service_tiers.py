"""Service tiers as lanes and bands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas.lanes import BANDS, DEFAULT_BAND, Lane, band_of_priority
from scheduling.service_tiers import DEFAULT, FLEX, PRIORITY, place_of_request, used_tier


@pytest.mark.parametrize(
    ("asked", "highest_band", "used"),
    [
        ("", 0, ""),
        ("auto", 0, DEFAULT),
        ("default", 0, DEFAULT),
        ("scale", 0, DEFAULT),
        ("flex", 0, FLEX),
        ("flex", 3, FLEX),
        ("priority", 0, PRIORITY),
        ("priority", 1, PRIORITY),
        ("priority", 2, DEFAULT),
        ("priority", 3, DEFAULT),
    ],
)
def test_a_request_gets_the_tier_that_its_tenant_may_have(asked: str, highest_band: int, used: str) -> None:
    """Priority only where that is earlier than the default band; a request that names none is told of none."""
    assert used_tier(asked, highest_band) == used


def test_tiers_are_lanes_and_bands() -> None:
    """Flex is the background lane, priority the first band that is allowed."""
    assert place_of_request("", 0, 0, background=False) == (Lane.INTERACTIVE, DEFAULT_BAND)
    assert place_of_request(DEFAULT, 0, 0, background=False) == (Lane.INTERACTIVE, DEFAULT_BAND)
    assert place_of_request(PRIORITY, 0, 0, background=False) == (Lane.INTERACTIVE, 0)
    assert place_of_request(PRIORITY, 5, 1, background=False) == (Lane.INTERACTIVE, 1)
    assert place_of_request(FLEX, 0, 0, background=False) == (Lane.BACKGROUND, DEFAULT_BAND)
    assert place_of_request(PRIORITY, 0, 0, background=True) == (Lane.BACKGROUND, 0)


@given(st.text(max_size=10), st.integers(), st.integers(0, BANDS - 1), st.booleans())
def test_no_tier_leads_past_the_highest_band(asked: str, priority: int, highest_band: int, background: bool) -> None:
    """Whatever is named, and with whatever priority."""
    tier = used_tier(asked, highest_band)
    lane, band = place_of_request(tier, priority, highest_band, background=background)
    assert max(highest_band, 0) <= band < BANDS
    assert lane in (Lane.INTERACTIVE, Lane.BACKGROUND)
    if tier != PRIORITY:
        assert band == max(band_of_priority(priority), highest_band)
