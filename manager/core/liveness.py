"""Who is dead.

Rules:

* A lease is lost when the renewal number of its incarnation stood still for a whole lease, on the Manager's monotonic
  clock, with Redis reachable throughout (:class:`BeatWatch`). Nothing else about time counts: clock jumps, a Redis
  that was away and a Manager that slept kill nobody.
* Sooner only when death is certain (:func:`judge`): the health port, which once answered as this very incarnation,
  refuses or answers as another one, and a ping on the control stream stays unanswered.
* Missed heartbeats alone prove nothing: they make a worker suspect, see :mod:`manager.core.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from queue_schemas import Incarnation

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


class DoorState(StrEnum):
    """What a worker's health port says."""

    SAME = "same"
    """It answers as the incarnation asked for."""
    OTHER = "other"
    """Somebody else answers."""
    REFUSED = "refused"
    """Nobody listens."""
    UNKNOWN = "unknown"
    """No answer in time, nonsense, or nowhere to ask."""


@dataclass(frozen=True, slots=True)
class Door:
    """A look at a worker's health port; ``note`` is a sentence about what is wrong with it."""

    state: DoorState
    note: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of an incarnation that is doubted.

    ``verified``: its URL answered as this incarnation before; until then the URL may belong to anybody, and what is
    found there proves nothing. ``has_number``: it has a renewal number now; ``had_number``: it had one before.
    ``fresh``: a heartbeat came not long ago.
    """

    door: DoorState
    verified: bool
    ping_answered: bool
    has_number: bool
    had_number: bool
    fresh: bool


class Verdict(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    """Certain: its jobs may be taken back at once."""
    SILENT = "silent"
    """Not proven: its lease decides."""


def judge(evidence: Evidence) -> Verdict:
    """Whether the incarnation is alive, certainly dead, or neither can be said."""
    if evidence.ping_answered or evidence.door is DoorState.SAME:
        return Verdict.ALIVE
    if evidence.had_number and not evidence.has_number:
        return Verdict.DEAD  # fenced already: by a reclaim, its own leaving, or a Redis that lost its data
    if evidence.verified and evidence.door in (DoorState.REFUSED, DoorState.OTHER):
        return Verdict.DEAD
    if not evidence.has_number and evidence.fresh:
        return Verdict.ALIVE  # it registered a moment ago and has not reached Redis yet
    return Verdict.SILENT
