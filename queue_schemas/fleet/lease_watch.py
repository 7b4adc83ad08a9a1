"""Decide which sessions have lost their lease, for Managers and fallback sweepers that reclaim jobs.

A lease is lost when the renewal counter of its session stood still for a whole lease, on the observer's own
monotonic clock, with Redis reachable throughout. Nothing else about time counts: clock jumps, a Redis that was away and
an observer that slept end no lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ids import SessionId

_MAX_GAP = 1 / 3
"""Part of a lease that may pass between two polls; after a longer one nothing is known of the time between."""


@dataclass(frozen=True, slots=True)
class _Observed:
    number: int
    since: float


class LeaseWatch:
    """Watches the renewal counters of every session id, known to the registry or not. Times in seconds."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._observed: dict[SessionId, _Observed] = {}
        self._last_answer: float | None = None

    def __contains__(self, session_id: SessionId) -> bool:
        """Whether the session had a renewal counter at the last poll: if not, it holds nothing."""
        return session_id in self._observed

    def observe(self, numbers: Mapping[SessionId, int], asked_at: float, answered_at: float) -> list[SessionId]:
        """Take in one poll; the sessions whose number stood still for a whole lease.

        The poll happened somewhere between the two times: stillness is counted from the answer to the last one that
        showed a change, to the question of this one.
        """
        if self._last_answer is not None and asked_at - self._last_answer > self._lease_s * _MAX_GAP:
            self.restart()
        self._last_answer = answered_at
        before = self._observed
        self._observed = {
            session_id: (
                known
                if (known := before.get(session_id)) is not None and known.number == number
                else _Observed(number, answered_at)
            )
            for session_id, number in numbers.items()
        }
        return [
            session_id for session_id, observed in self._observed.items() if asked_at - observed.since >= self._lease_s
        ]

    def restart(self) -> None:
        """Redis was out of reach: what was seen before says nothing about the time between."""
        self._observed.clear()
        self._last_answer = None


class ShardedLeaseWatch:
    """A :class:`LeaseWatch` per shard. A session that renews on any shard that answers is alive; shards that
    are unreachable do not count: a lease is lost when its number stood still on every shard that answers and has
    one."""

    def __init__(self, lease_s: float, shards: int) -> None:
        self._watches = [LeaseWatch(lease_s) for _ in range(shards)]
        self._still: dict[int, dict[SessionId, None]] = {}

    def __contains__(self, session_id: SessionId) -> bool:
        """Whether the session had a renewal counter on some shard at its last poll."""
        return any(session_id in watch for watch in self._watches)

    def observe(self, shard: int, numbers: Mapping[SessionId, int], asked_at: float, answered_at: float) -> None:
        """Take in one poll of ``shard``, as :meth:`LeaseWatch.observe` does."""
        self._still[shard] = dict.fromkeys(self._watches[shard].observe(numbers, asked_at, answered_at))

    def expired_sessions(self) -> list[SessionId]:
        """The sessions whose leases are lost, by the latest polls."""
        found = dict.fromkeys(session_id for still in self._still.values() for session_id in still)
        return [
            session_id
            for session_id in found
            if all(session_id in still or session_id not in self._watches[at] for at, still in self._still.items())
        ]

    def mark_unreachable(self, shard: int) -> None:
        """Discard what is known of a shard that was out of reach."""
        self._watches[shard].restart()
        self._still.pop(shard, None)

    def restart(self) -> None:
        """All shards were out of reach."""
        for shard in range(len(self._watches)):
            self.mark_unreachable(shard)
