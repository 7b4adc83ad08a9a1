"""Decide whether this worker sweeps in place of the Manager: one worker at a time does while no Manager acts.

Rules:

* The acting Manager is known by its leader lease in Redis, which it extends all the time. No Manager acts once that
  stood still for a whole lease of a worker, by the rule of :class:`~queue_schemas.fleet.lease_watch.LeaseWatch`: Redis
  in reach throughout, on our own monotonic clock. So a Manager that is late, or a failover to its standby, starts no
  sweep.
* The workers' renewal counters are watched from the first poll at which the Manager's lease stood still: a
  worker that dies meanwhile is found a lease after its death, not a lease after the Manager's was found. That is done
  by the one worker that holds the sweeper's lease (:mod:`worker.fallback_sweeper`).
"""

from __future__ import annotations

from collections.abc import Mapping

from queue_schemas import SessionId, ShardedLeaseWatch
from queue_schemas.fleet.lease_watch import LeaseWatch

_MANAGER = SessionId("manager")


class FallbackWatch:
    """What one worker knows of the Manager and of its peers. Times are seconds of one monotonic clock."""

    def __init__(self, lease_s: float, shards: int = 1) -> None:
        self.manager_absent = False
        """Whether no Manager acts, so that workers do what cannot wait."""
        self._manager = LeaseWatch(lease_s)
        self._peers = ShardedLeaseWatch(lease_s, shards)
        self._last: int | None = None

    def saw_manager(self, lease_until: int, asked_at: float, answered_at: float) -> bool:
        """Take in until when the leader lease lasts, by the queue's clock; whether to poll the workers' counters."""
        stood_still, self._last = lease_until == self._last, lease_until
        self.manager_absent = bool(self._manager.observe({_MANAGER: lease_until}, asked_at, answered_at))
        if not stood_still:
            self._peers.restart()
        return stood_still

    def saw_peers(self, counters: Mapping[SessionId, int], asked_at: float, answered_at: float, shard: int = 0) -> None:
        """Take in the workers' renewal counters on one shard."""
        self._peers.observe(shard, counters, asked_at, answered_at)

    def dead_peers(self) -> list[SessionId]:
        """The sessions whose jobs are to be reclaimed now. They have been watched for a lease then, and so has the
        Manager."""
        return self._peers.expired_sessions()

    def mark_shard_unreachable(self, shard: int) -> None:
        """One shard was out of reach."""
        self._peers.mark_unreachable(shard)

    def forget_peers(self) -> None:
        """Another worker watches them now."""
        self._peers.restart()

    def restart(self) -> None:
        """Redis was out of reach: nothing is known of the time between."""
        self.manager_absent = False
        self._last = None
        self._manager.restart()
        self._peers.restart()
