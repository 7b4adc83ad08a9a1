"""When to retry a failed delivery: soon at first, then at growing intervals, for about a day."""

from __future__ import annotations

WAITS_S = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 21_600, 28_800)
"""Seconds to wait after each attempt but the last; 22 hours in total."""
JITTER = 0.2
"""Each wait is longer by up to this share, so that deliveries that failed together do not retry together."""
MAX_ASKED_S = 6 * 3_600
"""Longest wait that a receiver can ask for."""


def max_tries(*, once: bool) -> int:
    """Maximum number of attempts of a delivery."""
    return 1 if once else len(WAITS_S) + 1


def wait_s(tries: int, draw: float, asked_s: float | None = None) -> float | None:
    """Seconds to wait after ``tries`` failed attempts; None: there is no further attempt.

    ``draw`` is a random number of [0, 1). ``asked_s`` is the receiver's ``Retry-After``; it can only lengthen the wait.
    """
    if tries > len(WAITS_S):
        return None
    wait = WAITS_S[max(tries, 1) - 1] * (1 + JITTER * draw)
    return max(wait, min(asked_s or 0.0, MAX_ASKED_S))
