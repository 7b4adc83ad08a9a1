"""What a scaler sees of a pool, from what becomes of its requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from queue_schemas.lanes import LANES, Lane
from scheduling.autoscale import LaneLoad, PoolLoad
from scheduling.prediction import Rate

from .requests import Request

_ARRIVALS_OVER_S = 30.0
"""Arrivals a second are an average that forgets with this time constant."""


class PoolFigures:
    """Requests by lane: those that wait, those that an engine began, how long these run, and how many come a second."""

    def __init__(self) -> None:
        self._waiting: Mapping[Lane, OrderedDict[Request, None]] = {lane: OrderedDict() for lane in LANES}
        self._leased: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._rates: dict[Lane, Rate] = dict.fromkeys(LANES, Rate())
        self._arrived = 0
        self._arrivals_per_s: float | None = None
        self._looked_at = 0.0

    def arrived(self, request: Request) -> None:
        """``request`` waits."""
        self._waiting[request.lane][request] = None
        self._arrived += request.lane is Lane.INTERACTIVE

    def started(self, request: Request) -> None:
        """``request`` runs, if it did not yet."""
        waiting = self._waiting[request.lane]
        if request in waiting:
            del waiting[request]
            self._leased[request.lane] += 1

    def interrupted(self, request: Request) -> None:
        """``request`` waits again, if it ran."""
        waiting = self._waiting[request.lane]
        if request not in waiting:
            waiting[request] = None
            self._leased[request.lane] -= 1

    def finished(self, request: Request, now: float) -> None:
        """``request`` runs no more."""
        lane = request.lane
        self._leased[lane] -= 1
        self._rates[lane] = self._rates[lane].observed(int((now - request.began_at) * 1e3), 0)

    def failed(self, request: Request) -> None:
        """``request``, which waited, will not run."""
        del self._waiting[request.lane][request]

    def load(self, now: float, workers: int, slots: int) -> PoolLoad:
        """All of it now; ``workers`` take work, with ``slots`` together. Called at intervals."""
        passed_s = now - self._looked_at
        if passed_s > 0:
            weight = passed_s / (passed_s + _ARRIVALS_OVER_S)
            known = self._arrivals_per_s or 0.0
            self._arrivals_per_s = known + weight * (self._arrived / passed_s - known)
            self._looked_at, self._arrived = now, 0
        lanes = {
            lane: LaneLoad(
                waiting=len(waiting),
                leased=self._leased[lane],
                oldest_age_ms=(now - next(iter(waiting)).queued_at) * 1e3 if waiting else 0,
                run_ms=rate.run_ms / rate.jobs if (rate := self._rates[lane]).jobs else None,
            )
            for lane, waiting in self._waiting.items()
        }
        return PoolLoad(lanes, workers=workers, slots=slots, arrivals_per_s=self._arrivals_per_s)
