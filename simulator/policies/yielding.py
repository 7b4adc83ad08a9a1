"""Preemption in the simulated queue: which attempts yield to interactive requests, by ``scheduling.preemption``."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict

from queue_schemas.ids import JobId
from queue_schemas.lanes import Lane
from scheduling.preemption import Yieldable, YieldPolicy, victim, yields_wanted

from ..fleet import Worker
from ..requests import Request

SHARE = 0.5
MIN_GAIN_S = 0.02


class Yielding:
    """Running attempts of lower lanes, and who of them was asked."""

    def __init__(self) -> None:
        self._leased: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._running: OrderedDict[JobId, tuple[Request, int]] = OrderedDict()
        """Attempts that were not asked, in the order in which they began (ms)."""
        self._asked: dict[JobId, tuple[Request, Yieldable]] = {}
        self._workers: dict[Worker, YieldPolicy] = {}
        self._lanes: defaultdict[Worker, Counter[Lane]] = defaultdict(Counter)
        """What each worker runs."""

    def started(self, request: Request, worker: Worker, now: float) -> None:
        """An attempt begins."""
        self._leased[request.lane] += 1
        self._lanes[worker][request.lane] += 1
        if request.lane is not Lane.INTERACTIVE and request.yields_left:
            self._running[_id(request)] = (request, int(now * 1e3))

    def ended(self, request: Request, worker: Worker, now: float) -> None:
        """An attempt is over, at its end or before."""
        self._leased[request.lane] -= 1
        self._lanes[worker][request.lane] -= 1
        self._running.pop(_id(request), None)
        self._asked.pop(_id(request), None)
        if request.generated == request.output_tokens:
            self._of(worker).ran(request.lane, now - request.began_at)

    def asks(self, waiting: int, now: float) -> Request | None:
        """The attempt that the queue asks to yield to ``waiting`` interactive requests, if any."""
        now_ms = int(now * 1e3)
        lower = self._leased[Lane.BACKGROUND] + self._leased[Lane.BATCH]
        asked = [one for _, one in self._asked.values()]
        if not yields_wanted(waiting, lower, self._leased[Lane.INTERACTIVE], asked, now_ms):
            return None
        # The core looks for the latest start among those that were not asked: there is but one.
        latest = next(reversed(self._running.items()), None)
        if latest is not None:
            asked.append(Yieldable(latest[0], latest[1][1]))
        chosen = victim(asked, now_ms)
        if chosen is None:
            return None
        began = self._running.pop(chosen.job_id, None)
        request = began[0] if began else self._asked[chosen.job_id][0]
        self._asked[chosen.job_id] = (request, Yieldable(chosen.job_id, chosen.started_at, now_ms))
        return request

    def agrees(self, request: Request, now: float) -> bool:
        """Whether the worker of ``request`` stops it now."""
        worker = request.worker
        if worker is None or _id(request) not in self._asked:
            return False
        policy, running = self._of(worker), self._lanes[worker]
        if policy.refusal(now, worker.slots, running, free=worker.slots - running.total()):
            return False
        policy.yielded(now)
        request.yields_left -= 1
        return True

    def _of(self, worker: Worker) -> YieldPolicy:
        return self._workers.setdefault(worker, YieldPolicy(SHARE, MIN_GAIN_S))


def _id(request: Request) -> JobId:
    return JobId(str(request.number))
