"""How fast jobs come to a lane: a rate from the queue's count of them, looked at about once a second.

The queue counts every job in the script that takes it in. The sweep looks at the counts and keeps what came since the
look before: no request pays for the rate, it is the same for all who ask, and whoever sweeps next goes on from it. What
came earlier counts less: a look that is ``passed_ms`` later leaves ``WINDOW_MS / (WINDOW_MS + passed_ms)`` of it. That
is exponential smoothing in implicit steps, which holds however far apart two looks are. A burst counts by its jobs over
the whole window, not by the second in which it came.

``broker/lua/expire.lua`` does the same in the script; the contract suite compares the two.
"""

from __future__ import annotations

from queue_schemas.records import record

WINDOW_MS = 30_000
"""How far back a rate looks, on average."""
LOOK_MS = 500
"""Two looks are at least so far apart."""
STALE_MS = 10_000
"""After so long without a look nothing is known of arrivals: nobody sweeps."""
_MILLI = 1_000


@record
class Arrivals:
    """``total`` jobs had come at the last look. Of those that came of late, ``milli_jobs`` thousandths are left."""

    total: int = 0
    milli_jobs: int = 0

    def looked_at(self, total: int, passed_ms: int) -> Arrivals:
        """After a look that finds ``total`` jobs, ``passed_ms`` (at least 0) after the one before. If the queue has
        lost some of its count, none is thought to have come."""
        came = max(total - self.total, 0)
        return Arrivals(total, int((self.milli_jobs + came * _MILLI) * (WINDOW_MS / (WINDOW_MS + passed_ms))))

    @property
    def per_s(self) -> float:
        """Jobs a second."""
        return round(self.milli_jobs / WINDOW_MS, 3)
