"""What waits in one lane of the simulated queue."""

from __future__ import annotations

from collections import deque

from queue_schemas.lanes import BAND_STEP, BANDS, band_order
from scheduling.fairness import Band
from scheduling.prediction import RETRIED, LaneState, Rate

from ..fleet import Worker
from ..requests import Request
from .warmth import Patience, Warmth


class Line:
    """Requests by band and tenant, and those that go on after they yielded.

    Tenants of a band take turns by what they are charged (``scheduling.fairness``); of the one whose turn it is, a
    worker takes the first, or with ``warmth`` one that it holds the prefix of. Unless ``fair``, all tenants are one.
    """

    __slots__ = ("_bands", "_costs", "_fair", "_patience", "_rate", "_retries", "_turn", "_warmth", "leased", "waiting")

    def __init__(self, warmth: Warmth | None, *, fair: bool) -> None:
        self._warmth = warmth
        self._fair = fair
        self._patience = Patience()
        self._bands: tuple[tuple[Band, dict[str, deque[Request]]], ...] = tuple((Band(), {}) for _ in range(BANDS))
        self._retries: deque[Request] = deque()
        self._turn = 0
        self._costs = [0] * (1 + BANDS)
        self._rate = Rate()
        self.waiting = 0
        self.leased = 0
        """Attempts that run."""

    @property
    def state(self) -> LaneState:
        """What predictions know of the lane."""
        return LaneState(self.waiting, tuple(self._costs), self.leased, self._rate)

    def before(self, request: Request) -> tuple[int, int]:
        """How many requests of its tenant wait before ``request``, which comes now, and tenants in its band."""
        queues = self._bands[request.band][1]
        return len(queues.get(self._tenant(request), ())), max(len(queues), 1)

    def ran(self, request: Request, now: float) -> None:
        """An attempt came to its end."""
        self._rate = self._rate.observed(
            int((now - request.began_at) * 1e3), request.cost, int(request.arrived_at * 1e3)
        )

    def put(self, request: Request) -> None:
        """``request`` waits for the first time."""
        self._patience.waits(request.digests)
        band, queues = self._bands[request.band]
        tenant = self._tenant(request)
        band.come(tenant)
        queues.setdefault(tenant, deque()).append(request)
        self.waiting += 1
        self._costs[request.band - RETRIED] += request.cost

    def put_again(self, request: Request) -> None:
        """``request`` yielded, and waits before new ones. What its tenant was charged is given back."""
        self.correct(request, 0.0)
        request.charged = None
        self._retries.append(request)
        self.waiting += 1
        self._costs[0] += request.cost

    def take(self, worker: Worker, now: float) -> Request:
        """The request that ``worker`` claims; there is one."""
        retries_first = self._turn % BAND_STEP != BAND_STEP - 1
        fresh = self.waiting > len(self._retries)
        if self._retries and (retries_first or not fresh):
            request = self._retries.popleft()
            self._costs[0] -= request.cost
            request.charged = 0.0
            self.correct(request, request.charge)
        else:
            request = self._take_fresh(worker, now)
            self._costs[request.band - RETRIED] -= request.cost
            request.waited_ms = int((now - request.queued_at) * 1e3)
        request.charged = request.charge
        self._turn += 1
        self.waiting -= 1
        self._patience.left(now - request.queued_at)
        return request

    def correct(self, request: Request, used: float) -> None:
        """The attempt of ``request`` cost its tenant ``used``, whatever it was charged when it was claimed."""
        if request.charged is not None:
            self._bands[request.band][0].correct(self._tenant(request), used - request.charged)

    def _tenant(self, request: Request) -> str:
        return request.tenant if self._fair else ""

    def _take_fresh(self, worker: Worker, now: float) -> Request:
        band, queues = next(self._bands[place] for place in band_order(self._turn) if self._bands[place][1])
        tenant = band.next() or ""
        queue = queues[tenant]
        chosen = 0
        if self._warmth is not None and len(queue) > 1 and self._patience.lasts(now - queue[0].queued_at):
            chosen = self._warmth.chosen((request.digests for request in queue), worker)
        request = queue[chosen]
        del queue[chosen]
        band.charge(tenant, request.charge)
        if not queue:
            del queues[tenant]
            band.leave(tenant)
        return request
