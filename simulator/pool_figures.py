"""What Routers would say of a pool, from what becomes of its requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from queue_schemas import LaneDepth, PoolDepth
from queue_schemas.lanes import LANES, Lane

from .requests import Request


class PoolFigures:
    """Requests by lane: those that wait, and those that an engine began."""

    def __init__(self) -> None:
        self._waiting: Mapping[Lane, OrderedDict[Request, None]] = {lane: OrderedDict() for lane in LANES}
        self._leased: dict[Lane, int] = dict.fromkeys(LANES, 0)

    def arrived(self, request: Request) -> None:
        """``request`` waits."""
        self._waiting[request.lane][request] = None

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

    def finished(self, request: Request) -> None:
        """``request`` runs no more."""
        self._leased[request.lane] -= 1

    def failed(self, request: Request) -> None:
        """``request``, which waited, will not run."""
        del self._waiting[request.lane][request]

    def depth(self, now: float, workers: int, slots: int) -> PoolDepth:
        """All of it now; ``workers`` take work, with ``slots`` together."""
        lanes = {
            lane: LaneDepth(
                waiting=len(waiting),
                leased=self._leased[lane],
                oldest_age_ms=int((now - next(iter(waiting)).queued_at) * 1e3) if waiting else 0,
            )
            for lane, waiting in self._waiting.items()
        }
        waiting, leased = (sum(getattr(lane, name) for lane in lanes.values()) for name in ("waiting", "leased"))
        return PoolDepth(
            model="",
            waiting=waiting,
            leased=leased,
            outstanding=waiting + leased,
            oldest_age_ms=max(lane.oldest_age_ms for lane in lanes.values()),
            workers=workers,
            slots=slots,
            lanes=lanes,
        )
