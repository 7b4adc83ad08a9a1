"""Whether this worker stands in for the Manager: one worker at a time does if none acts.

Rules:

* The acting Manager is known by its lease in Redis, which it extends all the time. No Manager acts once that stood
  still for a whole lease of a worker, by the rule of :class:`queue_schemas.LeaseWatch`: Redis in reach throughout, on
  our own monotonic clock. So a Manager that is late, or a failover to its standby, calls nobody.
* The workers' numbers are watched from the first look at which the Manager's stood still: whoever dies meanwhile is
  missed a lease after its death, not a lease after the Manager's was found over. That is done by the one worker that
  holds the sweeper's lease (:mod:`worker.fallback_sweeper`).
"""

from __future__ import annotations

from collections.abc import Mapping

from queue_schemas import LeaseWatch, SessionId, ShardedLeaseWatch

_MANAGER = SessionId("manager")


class FallbackSweep:
    """What one worker knows of the Manager and of its peers. Times are seconds of one monotonic clock."""

    def __init__(self, lease_s: float, shards: int = 1) -> None:
        self.acting = False
        """Whether no Manager acts, so that workers do what cannot wait."""
        self._manager = LeaseWatch(lease_s)
        self._peers = ShardedLeaseWatch(lease_s, shards)
        self._last: int | None = None

    def saw_manager(self, number: int, asked_at: float, answered_at: float) -> bool:
        """Take in the Manager's number; whether the workers' numbers are to be looked at as well."""
        stood_still, self._last = number == self._last, number
        self.acting = bool(self._manager.observe({_MANAGER: number}, asked_at, answered_at))
        if not stood_still:
            self._peers.restart()
        return stood_still

    def saw_peers(self, numbers: Mapping[SessionId, int], asked_at: float, answered_at: float, shard: int = 0) -> None:
        """Take in the workers' numbers on one shard."""
        self._peers.observe(shard, numbers, asked_at, answered_at)

    def dead_peers(self) -> list[SessionId]:
        """Those whose jobs are to be taken back now. They have been watched for a lease then, and so has the
        Manager's."""
        return self._peers.still()

    def shard_away(self, shard: int) -> None:
        """One shard was out of reach."""
        self._peers.away(shard)

    def forget_peers(self) -> None:
        """Another worker looks after them now."""
        self._peers.restart()

    def restart(self) -> None:
        """Redis was out of reach: nothing is known of the time between."""
        self.acting = False
        self._last = None
        self._manager.restart()
        self._peers.restart()
