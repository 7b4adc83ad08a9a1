"""How many connections each process of a Router has, in memory that they share: the fuller ones let others accept."""

from __future__ import annotations

import mmap
from collections.abc import Callable

YIELD_S = 0.002
"""How long a process with more connections than another leaves a new one to that."""
_SLACK = 2
_ABSENT = 1 << 40


class ConnectionCounts:
    """Made by the parent before it forks. A process counts itself whenever a connection waits, which wakes them all;
    one that does not run, or does not accept yet, counts for nobody."""

    def __init__(self, processes: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 8 * processes)).cast("q")
        for number in range(1, processes + 1):
            self.gone(number)

    def gone(self, number: int) -> None:
        """Process ``number``, from 1, has ended."""
        self._counts[number - 1] = _ABSENT

    def pause_of(self, number: int) -> Callable[[int], float]:
        """For process ``number``: given its open connections, how many seconds to leave the next one to others."""

        def pause_s(own: int) -> float:
            self._counts[number - 1] = own
            fewest = min(self._counts)
            return YIELD_S if own > fewest + _SLACK + fewest // 8 else 0.0

        return pause_s
