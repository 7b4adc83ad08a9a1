"""The failure detector's rules: whether a worker session is alive, certainly dead, or undecided.

Rules:

* A session loses its leases when its renewal counter stood still for a whole lease: see
  :class:`queue_schemas.fleet.lease_watch.LeaseWatch`.
* It is declared dead sooner only when that is certain (:func:`assess_liveness`): its health port, which once answered
  as this very session, refuses or answers as another one, and a ping on its control stream stays unanswered.
* Missed heartbeats alone prove nothing: they make a worker unresponsive, see :mod:`manager.core.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ProbeStatus(StrEnum):
    """What a worker's health port says."""

    SAME = "same"
    """It answers as the session asked for."""
    OTHER = "other"
    """Another session, another worker, or another program answers."""
    REFUSED = "refused"
    """Nobody listens."""
    UNKNOWN = "unknown"
    """No answer in time, nonsense, or no URL to ask."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of a worker's health port; ``note`` is a sentence about what is wrong with it."""

    status: ProbeStatus
    note: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a session that is checked.

    ``verified``: its URL answered as this session before; until then the URL may belong to anybody, and what is found
    there proves nothing. ``has_counter``: it has a renewal counter now; ``had_counter``: it had one before. ``fresh``:
    a heartbeat came not long ago.
    """

    probe: ProbeStatus
    verified: bool
    ping_answered: bool
    has_counter: bool
    had_counter: bool
    fresh: bool


class Liveness(StrEnum):
    """What the evidence proves."""

    ALIVE = "alive"
    DEAD = "dead"
    """Certain: its jobs may be reclaimed at once."""
    UNDECIDED = "undecided"
    """Not proven: its lease decides."""


def assess_liveness(evidence: Evidence) -> Liveness:
    """Whether the session is alive, certainly dead, or neither is proven."""
    if evidence.ping_answered or evidence.probe is ProbeStatus.SAME:
        return Liveness.ALIVE
    if evidence.had_counter and not evidence.has_counter:
        return Liveness.DEAD  # fenced already: by a reclaim, its own leaving, or a Redis that lost its data
    if evidence.verified and evidence.probe in (ProbeStatus.REFUSED, ProbeStatus.OTHER):
        return Liveness.DEAD
    if not evidence.has_counter and evidence.fresh:
        return Liveness.ALIVE  # it registered a moment ago and has not reached Redis yet
    return Liveness.UNDECIDED
