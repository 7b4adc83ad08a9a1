"""Whose lease is over: the rule, for whoever may take jobs back.

A lease is lost when the renewal number of its incarnation stood still for a whole lease, on the observer's own
monotonic clock, with Redis reachable throughout. Nothing else about time counts: clock jumps, a Redis that was away and
an observer that slept kill nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ids import Incarnation

_LONGEST_GAP = 1 / 3
"""Part of a lease that may pass between two polls; after a longer one nothing is known of the time between."""


@dataclass(frozen=True, slots=True)
class _Observed:
    number: int
    since: float


class BeatWatch:
    """Watches the renewal numbers of every incarnation, known to the registry or not. Times in seconds."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._observed: dict[Incarnation, _Observed] = {}
        self._last_answer: float | None = None

    def __contains__(self, incarnation: Incarnation) -> bool:
        """Whether the incarnation had a renewal number at the last poll: if not, it holds nothing."""
        return incarnation in self._observed

    def observe(self, numbers: Mapping[Incarnation, int], asked_at: float, answered_at: float) -> list[Incarnation]:
        """Take in one poll; the incarnations whose number stood still for a whole lease.

        The poll happened somewhere between the two times: stillness is counted from the answer to the last one that
        showed a change, to the question of this one.
        """
        if self._last_answer is not None and asked_at - self._last_answer > self._lease_s * _LONGEST_GAP:
            self.restart()
        self._last_answer = answered_at
        before = self._observed
        self._observed = {
            incarnation: (
                known
                if (known := before.get(incarnation)) is not None and known.number == number
                else _Observed(number, answered_at)
            )
            for incarnation, number in numbers.items()
        }
        return [
            incarnation
            for incarnation, observed in self._observed.items()
            if asked_at - observed.since >= self._lease_s
        ]

    def restart(self) -> None:
        """Redis was out of reach: what was seen before says nothing about the time between."""
        self._observed.clear()
        self._last_answer = None


class ShardedBeatWatch:
    """A :class:`BeatWatch` per shard. Who renews on any shard that answers is alive, and shards that are away have no
    say: a lease is lost when its number stood still on every shard that answers and has one."""

    def __init__(self, lease_s: float, shards: int) -> None:
        self._watches = [BeatWatch(lease_s) for _ in range(shards)]
        self._still: dict[int, dict[Incarnation, None]] = {}

    def __contains__(self, incarnation: Incarnation) -> bool:
        """Whether the incarnation had a renewal number on some shard when that was polled last."""
        return any(incarnation in watch for watch in self._watches)

    def observe(self, shard: int, numbers: Mapping[Incarnation, int], asked_at: float, answered_at: float) -> None:
        """Take in one poll of ``shard``, as :meth:`BeatWatch.observe` does."""
        self._still[shard] = dict.fromkeys(self._watches[shard].observe(numbers, asked_at, answered_at))

    def still(self) -> list[Incarnation]:
        """The incarnations whose leases are lost, by the latest polls."""
        found = dict.fromkeys(incarnation for still in self._still.values() for incarnation in still)
        return [
            incarnation
            for incarnation in found
            if all(incarnation in still or incarnation not in self._watches[at] for at, still in self._still.items())
        ]

    def away(self, shard: int) -> None:
        """The shard was out of reach."""
        self._watches[shard].restart()
        self._still.pop(shard, None)

    def restart(self) -> None:
        """All shards were out of reach."""
        for shard in range(len(self._watches)):
            self.away(shard)
