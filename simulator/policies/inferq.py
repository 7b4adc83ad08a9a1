"""inferq's queue: requests wait in one place, and workers pull what they have a slot for.

Lanes and bands are claimed in the order that ``queue_schemas.lanes`` says. A request that comes while nothing waits
before it is handed to the worker with the most free slots, as ``broker/lua/lib/handoff.lua`` does.
"""

from __future__ import annotations

from collections import deque

from queue_schemas.lanes import BANDS, LANES, Lane, band_order, lane_order

from ..fleet import Worker
from ..requests import Request
from .port import Dispatch, LoadLevels


class _Line:
    """What waits in one lane."""

    __slots__ = ("bands", "turn", "waiting")

    def __init__(self) -> None:
        self.bands: tuple[deque[Request], ...] = tuple(deque() for _ in range(BANDS))
        self.turn = 0
        self.waiting = 0

    def put(self, request: Request) -> None:
        self.bands[request.band].append(request)
        self.waiting += 1

    def take(self) -> Request:
        """The next request; there is one."""
        queue = next(self.bands[band] for band in band_order(self.turn) if self.bands[band])
        self.turn += 1
        self.waiting -= 1
        return queue.popleft()


class PullQueue:
    """Implements :class:`simulator.policies.port.Policy`. ``packs``: hand over to the worker with the fewest free slots
    instead, so that few workers are busy."""

    def __init__(self, dispatch: Dispatch, *, packs: bool = False) -> None:
        self._dispatch = dispatch
        self._lines: dict[Lane, _Line] = {lane: _Line() for lane in LANES}
        self._free = LoadLevels()
        """Workers that have a free slot, by where new work is handed to first."""
        self._sign = 1 if packs else -1

    @property
    def waiting(self) -> int:
        """Requests that no worker has claimed."""
        return sum(line.waiting for line in self._lines.values())

    def arrive(self, request: Request) -> None:
        """Hand ``request`` over, or queue it."""
        line = self._lines[request.lane]
        worker = None if line.waiting else self._free.lowest()
        if worker is None:
            line.put(request)
        else:
            self._dispatch(worker, request)
            self._offer(worker)

    def joined(self, worker: Worker) -> None:
        """``worker`` claims what it has slots for."""
        self.freed(worker)

    def left(self, worker: Worker) -> None:
        """``worker`` claims nothing more."""
        self._free.remove(worker)

    def freed(self, worker: Worker) -> None:
        """``worker`` claims for its free slots."""
        while worker.running < worker.slots:
            line = next((line for lane in lane_order(worker.turn) if (line := self._lines[lane]).waiting), None)
            if line is None:
                break
            worker.turn += 1
            self._dispatch(worker, line.take())
        self._offer(worker)

    def _offer(self, worker: Worker) -> None:
        """Have new work handed to ``worker`` as long as it has free slots."""
        if worker.running < worker.slots:
            self._free.put(worker, self._sign * (worker.slots - worker.running))
        else:
            self._free.remove(worker)
