"""The pauses before the next start where workers end soon after theirs, for drivers that start workers themselves."""

from __future__ import annotations

from telemetry.backoff import STEADY_S, Backoff

from .port import DriverFailed

_BACKOFF = Backoff(1.0, 60.0)


class StartPauses:
    """Times are seconds of the driver's clock."""

    def __init__(self) -> None:
        self._failures = 0
        self._not_before = float("-inf")
        self._last_words = ""

    def ended_well(self, ran_s: float) -> None:
        """A worker ended. One that ran for long has earned a fresh start for the others."""
        if ran_s >= STEADY_S:
            self._failures = 0

    def failed(self, now_s: float, ran_s: float, last_words: str) -> None:
        """A worker ended unasked with an error."""
        self.ended_well(ran_s)
        self._failures += 1
        self._not_before = now_s + _BACKOFF.pause_s(self._failures)
        self._last_words = last_words

    def check(self, now_s: float) -> None:
        """Raises ``DriverFailed`` while no worker should be started."""
        pause_s = self._not_before - now_s
        if pause_s > 0:
            raise DriverFailed(
                f"workers end by themselves, so the next is started in {pause_s:.0f} s; the last one said: "
                f"{self._last_words or 'nothing'}"
            )
