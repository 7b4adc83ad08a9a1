"""How an attempt changes a delivery's state. Beginnings are recorded first: a crash costs an attempt, never an
event."""

from __future__ import annotations

from http import HTTPStatus

from ..deliveries import Attempt, DeliveryState, Outcome
from .schedule import max_tries, wait_s

MAX_ATTEMPT_RECORDS = 20


def begin(state: DeliveryState, now_ms: int, limit_ms: int) -> DeliveryState:
    """An attempt begins. It counts as ended after ``limit_ms``; then the next one may begin.

    After attempts that were cut short the wait is longer: a delivery that crashes its sender must not do so in a loop.
    """
    cut_short = state.tries - len(state.attempts)
    wait = wait_s(cut_short, 0.0) if cut_short > 0 else 0.0
    next_at_ms = now_ms + limit_ms + round((wait or 0.0) * 1000)
    return state.model_copy(update={"tries": state.tries + 1, "next_at_ms": next_at_ms})


def conclude(
    state: DeliveryState, attempt: Attempt, *, once: bool, draw: float, asked_s: float | None = None
) -> DeliveryState:
    """The latest attempt has ended. ``draw`` and ``asked_s`` as in :func:`wait_s`."""
    attempts = (*state.attempts, attempt)[-MAX_ATTEMPT_RECORDS:]
    done = state.model_copy(update={"attempts": attempts})
    if attempt.status is not None and 200 <= attempt.status < 300:
        return done.model_copy(update={"outcome": Outcome.DELIVERED})
    wait = wait_s(state.tries, draw, asked_s)
    if wait is None or state.tries >= max_tries(once=once) or attempt.status == HTTPStatus.GONE:
        return give_up(done)
    return done.model_copy(update={"next_at_ms": attempt.at_ms + attempt.took_ms + round(wait * 1000)})


def give_up(state: DeliveryState, why: Attempt | None = None) -> DeliveryState:
    """Stop attempting; ``why`` is recorded as an attempt that was not made."""
    attempts = state.attempts if why is None else (*state.attempts, why)[-MAX_ATTEMPT_RECORDS:]
    return state.model_copy(update={"outcome": Outcome.GIVEN_UP, "attempts": attempts})
