"""How urgent the lines of a batch are, from its deadline and the rate at which it and others are answered.

A batcher calls :func:`next_state` about once a second for each batch that it dispatches, with what the other batches of
the pool need, and puts lines on the queue where :func:`place_of` says.

* **Slack.** A batch's load is the time that its remaining lines need at the rate they are answered now, over the time
  left to its deadline. Below one half nobody is hurried, and batches share.
* **Earliest feasible deadline first.** Of the batches with a higher load, the one with the earliest deadline may go
  first, the next behind it (Liu and Layland, 1973). The bands' order leaves each of the others its share.
* **The background lane too, when slack runs out.** Then every second line goes there: two lanes give it two of 16
  claims behind interactive requests that would take all, and all that they leave.
* **What cannot be done gives way.** A batch that is answered from both lanes and still could not end in time if it were
  alone goes back among the others: earliest deadline first would otherwise miss one deadline after the other.
* **Rates decay.** They are averages over a tenth of the time left, 5 s to 10 minutes: a batch with a day to go is not
  hurried by a busy minute, one with a minute to go reacts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from math import exp
from typing import Final

from queue_schemas.lanes import DEFAULT_BAND, Lane
from queue_schemas.records import record

INFEASIBLE_LOAD: Final = 1.5
"""The load of a batch, alone on all slots, from which on it is refused: predictions may be too long by so much."""


def load_alone(cost: int, *, ms_per_cost: float, slots: int, time_left_s: float) -> float:
    """The time that lines of ``cost`` (:mod:`scheduling.cost`) need if all slots work on nothing else, over the time
    left."""
    return cost * ms_per_cost / 1000 / max(slots, 1) / max(time_left_s, 1e-3)


class Urgency(IntEnum):
    """Where the lines of a batch are put."""

    NORMAL = 0
    SOON = 1
    """Also of a batch that begins: its first lines show its rate."""
    NEXT = 2
    LATE = 3


ENTER_LOAD: Final = (0.0, 0.5, 0.7, 0.85)
"""The load from which on a batch has each urgency. It loses one when its load falls below half of that."""
HURRIED_LOAD: Final = ENTER_LOAD[Urgency.SOON] / 2
"""The load from which on a batch takes its turn among those with short slack."""
HOPELESS_LOAD: Final = 1.2
"""The load, alone with the whole rate, at which a batch in both lanes gives way."""
HOPEFUL_LOAD: Final = 0.8
MIN_EVIDENCE_S: Final = 2.0
MIN_WINDOW_S: Final = 5.0
MAX_WINDOW_S: Final = 600.0
WINDOWS_BEFORE_HOPELESS: Final = 2.0
"""For how long a batch is tried in both lanes: by then its rate is that of both."""
WINDOWS_BEFORE_RETRY: Final = 6.0
"""After how long one that gave way is tried again: workers may have come, or others gone."""


@record
class UrgencyState:
    """The urgency of one batch, and the decayed sums that its rate is made of: lines answered, seconds passed. One line
    is counted as answered when it begins, so that a batch of long lines is not late before the first can have ended."""

    urgency: Urgency = Urgency.SOON
    lines: float = 1.0
    seconds: float = 0.0
    late_s: float = 0.0
    """For how long it has been in both lanes; or for how long it gives way, if it is hopeless."""
    hopeless: bool = False


@record
class BatchNeed:
    """What a batch still needs. ``rate``: lines answered a second; ``hopeless``: it gives way."""

    deadline_s: float
    """On any clock that all batches share."""
    remaining: int
    rate: float
    load: float
    hopeless: bool = False


def need_of(state: UrgencyState, *, remaining: int, deadline_s: float, now_s: float) -> BatchNeed | None:
    """What a batch needs now; None: its rate is not known."""
    if state.seconds < MIN_EVIDENCE_S:
        return None
    rate = state.lines / state.seconds
    load = remaining / max(rate, 1e-9) / max(deadline_s - now_s, 1e-3)
    return BatchNeed(deadline_s, remaining, rate, load, state.hopeless)


def next_state(
    state: UrgencyState,
    others: Sequence[BatchNeed] = (),
    *,
    answered: int,
    elapsed_s: float,
    remaining: int,
    deadline_s: float,
    now_s: float,
) -> UrgencyState:
    """The state after ``elapsed_s`` seconds in which ``answered`` lines got their answers; ``remaining`` have none.
    ``others`` is what the other batches of the pool need."""
    window_s = min(max((deadline_s - now_s) / 10, MIN_WINDOW_S), MAX_WINDOW_S)
    kept = exp(-elapsed_s / window_s)
    state = replace(state, lines=state.lines * kept + answered, seconds=state.seconds * kept + elapsed_s)
    need = need_of(state, remaining=remaining, deadline_s=deadline_s, now_s=now_s)
    if need is None:
        return state
    alone = need.load * need.rate / max(need.rate + sum(other.rate for other in others), 1e-9)
    if state.hopeless:
        late_s = state.late_s + elapsed_s
        stays = alone >= HOPEFUL_LOAD and late_s < WINDOWS_BEFORE_RETRY * window_s
        return replace(state, hopeless=stays, late_s=late_s if stays else 0.0)
    if state.urgency is Urgency.LATE:
        state = replace(state, late_s=state.late_s + elapsed_s)
        if alone >= HOPELESS_LOAD and state.late_s >= WINDOWS_BEFORE_HOPELESS * window_s:
            return replace(state, urgency=Urgency.NORMAL, late_s=0.0, hopeless=True)
    urgency = max(level for level in Urgency if need.load >= ENTER_LOAD[level])
    if urgency < state.urgency:
        urgency = Urgency(state.urgency - 1) if need.load < ENTER_LOAD[state.urgency] / 2 else state.urgency
    urgency = min(urgency, _highest(need, others))
    return replace(state, urgency=urgency, late_s=state.late_s if urgency is Urgency.LATE else 0.0)


def place_of(urgency: Urgency, line: int) -> tuple[Lane, int]:
    """Lane and band of the line with this number."""
    if urgency is Urgency.LATE and line % 2 == 0:
        return Lane.BACKGROUND, DEFAULT_BAND
    return Lane.BATCH, max(DEFAULT_BAND - urgency, 0)


def _highest(need: BatchNeed, others: Sequence[BatchNeed]) -> Urgency:
    """The highest urgency that a batch may have beside the others with short slack."""
    before = sum(
        1
        for other in others
        if other.load >= HURRIED_LOAD
        and not other.hopeless
        and (other.deadline_s, other.remaining) < (need.deadline_s, need.remaining)
    )
    return (Urgency.LATE, Urgency.SOON)[before] if before < 2 else Urgency.NORMAL
