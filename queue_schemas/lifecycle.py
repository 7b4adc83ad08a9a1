"""The lifecycle of a job: the only transition table.

Rules:

* A job is in exactly one state. ``queued`` jobs have one entry in one waiting stream; ``leased`` jobs have one lease.
* The last five states are terminal. A terminal record is a tombstone: it keeps the state, the epoch and the attempt
  that ended it, so that a repeated call is recognised, and nothing else. The tombstone of a persisted job with an
  answer stays as long as its output is kept.
* The epoch rises when an attempt ends without settling (``leased -> queued`` or ``leased -> lost``); a leased job that
  is cancelled or expires forgets its attempt instead. Either way nothing of that attempt is accepted afterwards.
* ``lost`` is for streams that are continued from what was delivered: they wait for their Router to say what that is.

Every script in ``broker/lua`` performs transitions of this table and no others.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """The states of a job; :data:`TRANSITIONS` says which may follow which."""

    QUEUED = "queued"
    LEASED = "leased"
    LOST = "lost"
    DONE = "done"
    FAILED = "failed"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.LEASED, State.CANCELLED, State.EXPIRED}),
    State.LEASED: frozenset(
        {State.DONE, State.FAILED, State.QUEUED, State.LOST, State.DEAD, State.CANCELLED, State.EXPIRED}
    ),
    State.LOST: frozenset({State.QUEUED, State.CANCELLED, State.EXPIRED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.DEAD: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}

TERMINAL: frozenset[State] = frozenset(state for state, following in TRANSITIONS.items() if not following)
