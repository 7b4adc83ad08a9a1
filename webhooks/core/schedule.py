"""When a webhook that failed is sent again: soon, then ever later, for about a day."""

from __future__ import annotations

WAITS_S = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 21_600, 28_800)
"""Seconds behind each attempt but the last; together 22 hours."""
JITTER = 0.2
"""Each wait is longer by up to this share, so that what failed together does not come back together."""
MAX_ASKED_S = 6 * 3_600
"""As long as a receiver may ask us to wait."""


def max_tries(*, once: bool) -> int:
    """How often a delivery is attempted at most."""
    return 1 if once else len(WAITS_S) + 1


def wait_s(tries: int, draw: float, asked_s: float | None = None) -> float | None:
    """Seconds until the next attempt behind ``tries`` failed ones; None: there is none.

    ``draw`` is a random number of [0, 1). ``asked_s`` is what the receiver asked for; it makes the wait longer only.
    """
    if tries > len(WAITS_S):
        return None
    wait = WAITS_S[max(tries, 1) - 1] * (1 + JITTER * draw)
    return max(wait, min(asked_s or 0.0, MAX_ASKED_S))
