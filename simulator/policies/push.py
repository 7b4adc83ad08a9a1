"""Routers that push: each request is sent to a worker at once, and waits in its engine.

While no worker is ready, requests wait for the first one.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections import deque

from ..fleet import Worker
from ..requests import Request
from .port import LoadLevels, PolicyContext

RING_POINTS = 100
"""Of each worker on the ring of consistent hashing."""
LOAD_BOUND = 1.25
"""The most that a worker may have, in average loads: the paper's 1 + epsilon, with an epsilon of 1/4."""
KEY_BLOCKS = 2
"""Blocks of a prompt that stand for its conversation: the first is often the same system prompt for all."""


class _Push:
    """What all of them have: workers, and requests that came while there was none."""

    def __init__(self, context: PolicyContext) -> None:
        self._dispatch = context.dispatch
        self._without_worker: deque[Request] = deque()

    @property
    def waiting(self) -> int:
        return len(self._without_worker)

    def arrive(self, request: Request) -> None:
        worker = self._choose(request)
        if worker is None:
            self._without_worker.append(request)
        else:
            self._dispatch(worker, request)
            self._loaded(worker)

    def joined(self, worker: Worker) -> None:
        self._add(worker)
        waiting, self._without_worker = self._without_worker, deque()
        for request in waiting:
            self.arrive(request)

    def ended(self, request: Request, worker: Worker) -> None:
        if not worker.leaving:
            self._loaded(worker)

    def _choose(self, request: Request) -> Worker | None:
        raise NotImplementedError

    def _add(self, worker: Worker) -> None:
        raise NotImplementedError

    def _loaded(self, worker: Worker) -> None:
        """Its load changed."""


class RoundRobin(_Push):
    """Each worker in turn."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._workers: deque[Worker] = deque()

    def left(self, worker: Worker) -> None:
        self._workers.remove(worker)

    def _add(self, worker: Worker) -> None:
        self._workers.append(worker)

    def _choose(self, request: Request) -> Worker | None:
        if not self._workers:
            return None
        self._workers.rotate(-1)
        return self._workers[-1]


class LeastLoaded(_Push):
    """The worker with the fewest requests."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._levels = LoadLevels()

    def left(self, worker: Worker) -> None:
        self._levels.remove(worker)

    def _add(self, worker: Worker) -> None:
        self._loaded(worker)

    def _loaded(self, worker: Worker) -> None:
        self._levels.put(worker, worker.running)

    def _choose(self, request: Request) -> Worker | None:
        return self._levels.lowest()


class BoundedHashing(_Push):
    """Consistent hashing of a prompt's beginning with bounded loads (Mirrokni, Thorup, Zadimoghaddam: Consistent
    Hashing with Bounded Loads, SODA 2018): the first worker clockwise that has less than its bound."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._ring: list[tuple[int, int, Worker]] = []
        self._workers: set[Worker] = set()
        self._running = 0

    def left(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._running -= worker.running
        self._ring = [point for point in self._ring if point[2] is not worker]

    def ended(self, request: Request, worker: Worker) -> None:
        self._running -= not worker.leaving

    def _add(self, worker: Worker) -> None:
        self._workers.add(worker)
        self._ring += [(_hash(f"{worker.number} {point}"), worker.number, worker) for point in range(RING_POINTS)]
        self._ring.sort(key=lambda point: point[:2])

    def _loaded(self, worker: Worker) -> None:
        self._running += 1

    def _choose(self, request: Request) -> Worker | None:
        if not self._workers:
            return None
        bound = math.ceil(LOAD_BOUND * (self._running + 1) / len(self._workers))
        ring = self._ring
        place = bisect(ring, (_hash(_key(request)),))
        for step in range(len(ring)):
            worker = ring[(place + step) % len(ring)][2]
            if worker.running < bound:
                return worker
        raise AssertionError("the bound lies above the average load, so some worker has less")


def _key(request: Request) -> str:
    return f"{request.blocks[:KEY_BLOCKS]}" if request.blocks else f"{request.tenant} {request.number}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
