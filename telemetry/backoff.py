"""Pauses between retries and restarts for every role: exponential, with jitter and a maximum, computed by tenacity.

Jitter keeps processes that lost the same server from coming back in step (M. Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015: "equal jitter").
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_never,
    wait_exponential,
    wait_random_exponential,
)

T = TypeVar("T")

MAX_PAUSE_S = 15.0
STEADY_S = 60.0
"""A process that ran for so long has earned a fresh start."""
MAX_IN_A_ROW = 8
"""Give up after so many ends in a row without a steady run: after about a minute."""
EXIT_REFUSED = 2
"""A process's exit code for what its user must correct."""


class Backoff:
    """The pauses of one kind of retry. It holds no state: callers count their failures in a row."""

    __slots__ = ("_wait",)

    def __init__(self, first_s: float, max_s: float, *, jitter: float = 0.5) -> None:
        """Pauses start at ``first_s`` seconds and double up to ``max_s``. ``jitter`` is the part of each pause that is
        random: with 0.5, a pause lasts between half of its length and all of it; with 0, exactly its length."""
        fixed = 1 - jitter
        self._wait = wait_exponential(first_s * fixed, max_s * fixed) + wait_random_exponential(
            first_s * jitter, max_s * jitter
        )

    def pause_s(self, failures: int) -> float:
        """The pause in seconds after ``failures`` failures in a row (1 after the first)."""
        state = RetryCallState(_NO_CALL, None, (), {})
        state.attempt_number = max(failures, 1)
        return self._wait(state)

    async def retry(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        when: Callable[[BaseException], bool],
        failed: Callable[[BaseException, float], None] = lambda _error, _pause_s: None,
        max_attempts: int | None = None,
    ) -> T:
        """Await ``call()`` until it succeeds; return what it returns.

        Raises its error if ``when(error)`` is false, or after ``max_attempts`` calls (None: there is no limit).
        ``failed(error, pause_s)`` is called before each pause.
        """

        async def attempt() -> T:
            return await call()

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome is not None else None
            if error is not None:
                failed(error, state.upcoming_sleep)

        retrying = AsyncRetrying(
            wait=self._wait,
            stop=stop_never if max_attempts is None else stop_after_attempt(max_attempts),
            retry=retry_if_exception(when),
            before_sleep=before_sleep,
            reraise=True,
        )
        return await retrying(attempt)


_NO_CALL = AsyncRetrying()
"""tenacity's wait strategies read a retry's state, which names the retry that it belongs to."""

_RESTART_BACKOFF = Backoff(0.5, MAX_PAUSE_S, jitter=0)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often in a row a process has ended: when it is started again, and when no more. A pure decision."""

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
        return state, _RESTART_BACKOFF.pause_s(state.in_a_row)
