"""Lanes, priority bands and the claim order that keeps each of them from starving.

A claim looks at the lanes in order, interactive first, with two exceptions in every ``LANE_CYCLE`` jobs that one
worker claims: once background goes first, once batch goes first. Inside a pool's lane the bands go in order, except
that every ``BAND_STEP``-th job starts from another band, each of them in turn; and lost work (the retry stream) goes
before new work except on that same turn.

Where regions are named, a worker claims in each lane what is of its own region and what may be run anywhere, in turns.

``broker/lua/claim.lua`` does what these functions say; the contract tests compare the two.
"""

from __future__ import annotations

from enum import StrEnum


class Lane(StrEnum):
    """Who waits for the answer."""

    INTERACTIVE = "interactive"
    """A client holds a connection open."""
    BACKGROUND = "background"
    """A stored response that will be fetched later."""
    BATCH = "batch"
    """A line of a batch."""


LANES: tuple[Lane, ...] = (Lane.INTERACTIVE, Lane.BACKGROUND, Lane.BATCH)

BANDS = 4
"""Priority bands in a lane, 0 the most urgent."""
DEFAULT_BAND = 2

LANE_CYCLE = 16
BAND_STEP = 4
BAND_CYCLE = BAND_STEP * (BANDS - 1)
"""Each band but the first goes first once in so many jobs that are claimed from one lane of one pool."""
STARVATION_BOUND = LANE_CYCLE * BAND_CYCLE
"""With one tenant and one pool, a waiting head of any lane and band is claimed within so many claims of one worker."""
REGIONAL_STARVATION_BOUND = 2 * STARVATION_BOUND
"""The same for a worker of a region, for what is of that region and for what is anybody's."""


def lane_order(turn: int) -> tuple[Lane, ...]:
    """The order in which the ``turn``-th job (from 0) that a worker claims is looked for."""
    if turn % LANE_CYCLE == LANE_CYCLE - 1:
        return (Lane.BATCH, Lane.INTERACTIVE, Lane.BACKGROUND)
    if turn % (LANE_CYCLE // 2) == LANE_CYCLE // 2 - 1:
        return (Lane.BACKGROUND, Lane.INTERACTIVE, Lane.BATCH)
    return LANES


def band_order(turn: int) -> tuple[int, ...]:
    """The order of bands for the ``turn``-th job (from 0) claimed from one lane of one pool."""
    first = 0
    if turn % BAND_STEP == BAND_STEP - 1:
        first = turn // BAND_STEP % (BANDS - 1) + 1
    return (first, *(band for band in range(BANDS) if band != first))


def region_first(turn: int) -> bool:
    """Whether the ``turn``-th job that a worker claims is first looked for in its own region, not among what may be run
    anywhere. The order is shifted in each cycle of lanes, so that every lane has both."""
    return (turn + turn // LANE_CYCLE) % 2 == 0


def band_of_priority(priority: int) -> int:
    """The band of a request's ``priority`` as vLLM defines it (lower is earlier, 0 the default)."""
    if priority < -10:
        return 0
    if priority < 0:
        return 1
    return DEFAULT_BAND if priority == 0 else BANDS - 1
