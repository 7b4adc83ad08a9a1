"""Whether this worker stands in for the Manager: any worker does if none acts.

Rules:

* The acting Manager is known by its lease in Redis, which it extends all the time. No Manager acts once that stood
  still for a whole lease of a worker, by the rule of :class:`queue_schemas.BeatWatch`: Redis in reach throughout, on
  our own monotonic clock. So a Manager that is late, or a failover to its standby, calls nobody.
* The workers' numbers are watched from the first look at which the Manager's stood still: whoever dies meanwhile is
  missed a lease after its death, not a lease after the Manager's was found over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from queue_schemas import BeatWatch, Incarnation

_MANAGER = Incarnation("manager")


class StandIn:
    """What one worker knows of the Manager and of its peers. Times are seconds of one monotonic clock."""

    def __init__(self, lease_s: float) -> None:
        self.acting = False
        """Whether no Manager acts, so that this worker does what cannot wait."""
        self._manager = BeatWatch(lease_s)
        self._peers = BeatWatch(lease_s)
        self._last: int | None = None

    def saw_manager(self, number: int, asked_at: float, answered_at: float) -> bool:
        """Take in the Manager's number; whether the workers' numbers are to be looked at as well."""
        stood_still, self._last = number == self._last, number
        self.acting = bool(self._manager.observe({_MANAGER: number}, asked_at, answered_at))
        if not stood_still:
            self._peers.restart()
        return stood_still

    def saw_peers(
        self, numbers: Mapping[Incarnation, int], asked_at: float, answered_at: float
    ) -> Sequence[Incarnation]:
        """Take in the workers' numbers; those whose jobs are to be taken back now. They have been watched for a lease
        then, and so has the Manager's."""
        return self._peers.observe(numbers, asked_at, answered_at)

    def restart(self) -> None:
        """Redis was out of reach: nothing is known of the time between."""
        self.acting = False
        self._last = None
        self._manager.restart()
        self._peers.restart()
