"""What Routers would say of a pool, from what becomes of its requests."""

from __future__ import annotations

from collections import OrderedDict

from queue_schemas import LaneDepth, PoolDepth
from queue_schemas.fleet.pools import pool_depth
from queue_schemas.lanes import LANES
from scheduling.arrivals import LOOK_MS, Arrivals
from scheduling.prediction import Rate

from .requests import Request


class _LaneFigures:
    """One lane: requests that wait, in the order they came in, and since when others run."""

    __slots__ = ("_arrivals", "_came", "_cost", "_rate", "_running", "_waiting")

    def __init__(self) -> None:
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._running: dict[Request, float] = {}
        self._cost = self._came = 0
        self._rate = Rate()
        self._arrivals = Arrivals()

    def came(self, request: Request) -> None:
        self._came += 1
        self._wait(request)

    def started(self, request: Request, now: float) -> None:
        if request in self._waiting:
            self._leave(request)
            self._running[request] = now

    def interrupted(self, request: Request) -> None:
        if self._running.pop(request, None) is not None:
            self._wait(request)

    def finished(self, request: Request, now: float) -> None:
        run_ms = int((now - self._running.pop(request)) * 1e3)
        self._rate = self._rate.observed(run_ms, request.cost, int(request.arrived_at * 1e3))

    def failed(self, request: Request) -> None:
        if self._running.pop(request, None) is None:
            self._leave(request)

    def look(self, passed_ms: int) -> None:
        self._arrivals = self._arrivals.looked_at(self._came, passed_ms)

    def depth(self, now: float) -> LaneDepth:
        if not (self._waiting or self._running):
            return LaneDepth()  # as of the queue, which says nothing of a lane without jobs
        first = next(iter(self._waiting), None)
        return LaneDepth(
            waiting=len(self._waiting),
            leased=len(self._running),
            oldest_age_ms=0 if first is None else int((now - first.queued_at) * 1e3),
            cost=self._cost,
            ms_per_cost=self._rate.ms_per_cost,
            ms_per_job=self._rate.ms_per_job,
            arrivals_per_s=self._arrivals.per_s,
        )

    def _wait(self, request: Request) -> None:
        self._waiting[request] = None
        self._cost += request.cost

    def _leave(self, request: Request) -> None:
        del self._waiting[request]
        self._cost -= request.cost


class PoolFigures:
    """Requests by lane: those that wait and run, what they cost, how fast they come and are served."""

    def __init__(self) -> None:
        self._lanes = {lane: _LaneFigures() for lane in LANES}
        self._looked_at = 0.0

    def arrived(self, request: Request) -> None:
        """``request`` waits."""
        self._lanes[request.lane].came(request)

    def started(self, request: Request, now: float) -> None:
        """``request`` runs, if it did not yet."""
        self._lanes[request.lane].started(request, now)

    def interrupted(self, request: Request) -> None:
        """``request`` waits again, if it ran."""
        self._lanes[request.lane].interrupted(request)

    def finished(self, request: Request, now: float) -> None:
        """``request``, which ran, has its answer."""
        self._lanes[request.lane].finished(request, now)

    def failed(self, request: Request) -> None:
        """``request`` will not run, or no longer."""
        self._lanes[request.lane].failed(request)

    def depth(self, now: float, workers: int, slots: int) -> PoolDepth:
        """All of it now; ``workers`` take work, with ``slots`` together. Arrivals are looked at as the queue's sweep
        does, at the calls of this method."""
        passed_ms = int((now - self._looked_at) * 1e3)
        if passed_ms >= LOOK_MS:
            self._looked_at = now
            for figures in self._lanes.values():
                figures.look(passed_ms)
        depths = {lane: figures.depth(now) for lane, figures in self._lanes.items()}
        return pool_depth("", depths, workers=workers, slots=slots)
