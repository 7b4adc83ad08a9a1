"""How fast a pool serves its jobs.

``broker/lua/lib/rates.lua`` does the same in the script that settles; the contract suite compares the two.
"""

from __future__ import annotations

from queue_schemas.records import record

RATE_JOBS = 64
"""How many of the latest jobs a rate remembers, roughly: older ones fade by one part in so many with each new one."""


@record
class Rate:
    """What jobs of one pool and lane took of late: ``jobs`` (at most ``RATE_JOBS``), for how long these had a slot, in
    ms, and what they were thought to cost (:mod:`scheduling.cost`)."""

    jobs: int = 0
    run_ms: int = 0
    cost: int = 0

    def observed(self, run_ms: int, cost: int) -> Rate:
        """The rate once one more job is done."""
        if self.jobs < RATE_JOBS:
            return Rate(self.jobs + 1, self.run_ms + run_ms, self.cost + cost)
        return Rate(
            self.jobs,
            self.run_ms + run_ms - self.run_ms // RATE_JOBS,
            self.cost + cost - self.cost // RATE_JOBS,
        )
