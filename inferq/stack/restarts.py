"""When a role that ended is started again, and when no more: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from telemetry.backoff import Backoff

MAX_PAUSE_S = 15.0
_BACKOFF = Backoff(0.5, MAX_PAUSE_S, jitter=0)
STEADY_S = 60.0
"""A role that ran for so long has earned a fresh start."""
MAX_IN_A_ROW = 8
"""Give up after so many ends in a row without a steady run: after about a minute."""
EXIT_REFUSED = 2
"""A role's exit code for what its user must correct."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often in a row a role has ended."""

    in_a_row: int = 0
    was_ready: bool = False

    def ended(self, exit_code: int, ran_s: float, *, ready: bool) -> tuple[Restarts, float | None]:
        """The state after an end, and the pause before the next start in seconds; None: give up."""
        state = replace(
            self,
            in_a_row=1 if ran_s >= STEADY_S else self.in_a_row + 1,
            was_ready=self.was_ready or ready,
        )
        # What never served and says that it must not start will not be helped by trying again.
        hopeless = exit_code == EXIT_REFUSED and not state.was_ready
        if hopeless or state.in_a_row >= MAX_IN_A_ROW:
            return state, None
        return state, _BACKOFF.pause_s(state.in_a_row)
