"""When a prefix cache counts as having forgotten what it served."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.cache_age import GENERATIONS, CacheAge, next_age
from scheduling.slots import EngineLoad

LOAD = EngineLoad(0, 0, 0.0, 0, 0, 0, 0, 1_000)


def rises_of(*readings: EngineLoad | None) -> list[int]:
    """By how much the number rises at each reading."""
    age, rises = CacheAge(), []
    for load in readings:
        age, more = next_age(age, load)
        rises.append(more)
    return rises


def stored(tokens: int, **fields: float) -> EngineLoad:
    return replace(LOAD, prefix_queries=tokens, **fields)  # type: ignore[arg-type]


def test_the_number_rises_whenever_the_room_was_filled() -> None:
    """The room is what running requests leave free."""
    assert rises_of(*map(stored, (0, 999, 1_000, 1_999, 2_000))) == [0, 0, 1, 0, 1]
    assert rises_of(*(stored(tokens, kv_usage=0.75) for tokens in (0, 249, 250, 500))) == [0, 0, 1, 1]


def test_generated_tokens_are_stored_and_hits_are_not() -> None:
    assert rises_of(LOAD, replace(LOAD, generated=1_000)) == [0, 1]
    assert rises_of(LOAD, stored(1_900, prefix_hits=1_000), stored(1_900, prefix_hits=900)) == [0, 0, 1]


def test_what_was_stored_before_the_first_reading_tells_nothing() -> None:
    assert rises_of(stored(10**6), stored(10**6 + 999)) == [0, 0]


def test_an_engine_that_counts_anew_has_another_cache() -> None:
    assert rises_of(stored(10**6), stored(100), stored(1_099), stored(1_100)) == [0, GENERATIONS, 0, 1]


def test_a_page_that_lacks_a_figure_once_changes_nothing() -> None:
    full = stored(100, generated=9_000)
    assert rises_of(full, replace(full, generated=None), full) == [0, 0, 0]


def test_much_at_once_makes_all_cold() -> None:
    """Not more than that, whatever an engine says."""
    assert rises_of(LOAD, stored(2**53)) == [0, GENERATIONS]


def test_a_cache_of_nothing_forgets_at_once() -> None:
    """As vLLM's with prefix caching off, which looks up nothing, but generates."""
    off = replace(LOAD, cache_tokens=0)
    assert rises_of(off, replace(off, generated=1), replace(off, generated=1)) == [0, GENERATIONS, 0]


def test_requests_that_fill_the_cache_leave_some_room() -> None:
    full = [stored(tokens, kv_usage=1.0) for tokens in (0, 99, 100)]
    assert rises_of(*full) == [0, 0, 1]


@pytest.mark.parametrize("unknown", ["cache_tokens", "prefix_queries", "prefix_hits", "generated"])
def test_without_these_figures_nothing_is_forgotten(unknown: str) -> None:
    one = {unknown: None}
    assert rises_of(replace(LOAD, **one), replace(stored(10**9), **one), None) == [0, 0, 0]  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 400), min_size=1), st.integers(1, 100))
def test_readings_apart_tell_the_same(steps: list[int], room: int) -> None:
    """However often an engine is asked, unless much more than its room passes between two readings."""
    total, readings = 0, [stored(0, cache_tokens=room * 250)]
    for step in steps:
        total += step
        readings.append(stored(total, cache_tokens=room * 250))
    edge = min(total % (room * 250), -total % (room * 250))
    assert abs(sum(rises_of(*readings)) - total // (room * 250)) <= (edge == 0)  # sums of shares are rounded
