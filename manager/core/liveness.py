"""Who is dead.

Rules:

* A lease is lost when the renewal number of its session id stood still for a whole lease: see
  :class:`queue_schemas.LeaseWatch`.
* Sooner only when death is certain (:func:`judge`): the health port, which once answered as this very session id,
  refuses or answers as another one, and a ping on the control stream stays unanswered.
* Missed heartbeats alone prove nothing: they make a worker suspect, see :mod:`manager.core.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DoorState(StrEnum):
    """What a worker's health port says."""

    SAME = "same"
    """It answers as the session id asked for."""
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
    """What is known of an session id that is doubted.

    ``verified``: its URL answered as this session id before; until then the URL may belong to anybody, and what is
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
    """Whether the session id is alive, certainly dead, or neither can be said."""
    if evidence.ping_answered or evidence.door is DoorState.SAME:
        return Verdict.ALIVE
    if evidence.had_number and not evidence.has_number:
        return Verdict.DEAD  # fenced already: by a reclaim, its own leaving, or a Redis that lost its data
    if evidence.verified and evidence.door in (DoorState.REFUSED, DoorState.OTHER):
        return Verdict.DEAD
    if not evidence.has_number and evidence.fresh:
        return Verdict.ALIVE  # it registered a moment ago and has not reached Redis yet
    return Verdict.SILENT
