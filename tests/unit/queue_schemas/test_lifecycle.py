"""The transition table has the properties that the scripts and the invariants rely on."""

from __future__ import annotations

import pytest

from queue_schemas import TERMINAL, State
from queue_schemas.lifecycle import TRANSITIONS

LIVE = frozenset(State) - TERMINAL


def test_every_state_stands_in_the_table() -> None:
    """No state without a row, no row without a state."""
    assert set(TRANSITIONS) == set(State)


def test_the_terminal_states_are_the_five_endings() -> None:
    """Done, failed, dead, cancelled, expired: nothing follows them."""
    assert {State.DONE, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED} == TERMINAL
    assert all(following not in TRANSITIONS[state] for state in TERMINAL for following in State)


@pytest.mark.parametrize("state", sorted(LIVE))
def test_every_live_job_can_end(state: State) -> None:
    """From every live state a terminal one can be reached, and cancelling and expiring always can be next."""
    assert State.CANCELLED in TRANSITIONS[state]
    assert State.EXPIRED in TRANSITIONS[state]


def test_every_state_can_be_reached_from_queued() -> None:
    """Jobs begin queued; nothing in the table is out of reach."""
    reached, frontier = set[State](), {State.QUEUED}
    while frontier:
        reached |= frontier
        frontier = {following for state in frontier for following in TRANSITIONS[state]} - reached
    assert reached == set(State)


def test_only_a_leased_job_gets_an_answer() -> None:
    """A result needs an attempt: only ``leased`` leads to done, failed or dead."""
    for ending in (State.DONE, State.FAILED, State.DEAD):
        assert {state for state in State if ending in TRANSITIONS[state]} == {State.LEASED}


def test_only_a_waiting_job_is_leased() -> None:
    """A claim takes queued jobs, nothing else."""
    assert {state for state in State if State.LEASED in TRANSITIONS[state]} == {State.QUEUED}


def test_no_state_follows_itself() -> None:
    """A transition changes the state."""
    assert not any(state in TRANSITIONS[state] for state in State)
