"""inferq's queue: requests wait in one place, and workers pull what they have a slot for.

Lanes and bands are claimed in the order that ``queue_schemas.lanes`` says, tenants take turns by tokens
(``scheduling.fairness``). A request that comes while nothing waits before it is handed to the worker with the lowest
load, as ``broker/lua/lib/handoff.lua`` does, or to one that holds its prefix (``scheduling.affinity``). Where an
interactive request finds no free slot, another request yields (``scheduling.preemption``). Workers adapt their slots to
their engines (``scheduling.slots``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from queue_schemas.lanes import LANES, Lane, lane_order
from scheduling.cache_age import CacheAge, next_age
from scheduling.cost import Usage, cost_of
from scheduling.fairness import charge_of
from scheduling.prediction import place_of
from scheduling.slots import SlotBounds, SlotState, asks_now, first_state, next_state

from ..fleet import Worker
from ..requests import Request
from .line import Line
from .port import LoadLevels, PolicyContext
from .warmth import Warmth
from .yielding import Yielding

READ_ENGINE_S = 1.0
LOAD_LEVELS = 512
"""Workers are told apart by their load in such parts."""


@dataclass(frozen=True, slots=True)
class QueueRules:
    """Which of the queue's decisions are taken.

    ``fairness``: tenants take turns by tokens over their ``weights`` (1 for others), else all are one. ``max_slots``:
    workers adapt their slots to their engines, up to so many; None: they keep them. ``max_yields``: how often a request
    of a lower lane may yield; 0: none does. ``packs``: hand over to the worker with the highest load, so that few
    workers are busy; no real queue does.
    """

    affinity: bool = True
    max_slots: int | None = None
    max_yields: int = 0
    fairness: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)
    packs: bool = False


@dataclass(slots=True)
class _Reading:
    """What a worker knows of its engine, and for how many intervals it did not ask."""

    bounds: SlotBounds
    state: SlotState
    age: CacheAge = field(default_factory=CacheAge)
    passed: int = 0


class PullQueue:
    """Implements :class:`simulator.policies.port.Policy`."""

    def __init__(self, context: PolicyContext, rules: QueueRules) -> None:
        self._context = context
        self._clock = context.clock
        self._rules = rules
        self._warmth = Warmth(context.block_tokens) if rules.affinity else None
        self._yielding = Yielding() if rules.max_yields else None
        self._lines: dict[Lane, Line] = {lane: Line(self._warmth, fair=rules.fairness) for lane in LANES}
        self._readings: dict[Worker, _Reading] = {}
        self._free = LoadLevels()
        """Workers that have a free slot, by where new work is handed to first."""
        self._sign = -1 if rules.packs else 1

    @property
    def waiting(self) -> int:
        """Requests that no worker has claimed."""
        return sum(line.waiting for line in self._lines.values())

    def arrive(self, request: Request) -> None:
        """Hand ``request`` over, or queue it."""
        self._prepare(request)
        line = self._lines[request.lane]
        best = None if line.waiting else self._free.lowest()
        if best is None:
            states = {lane: one.state for lane, one in self._lines.items()}
            request.predicted_ms = place_of(states, request.lane, request.band, *line.before(request)).wait_ms
            line.put(request)
            if request.lane is Lane.INTERACTIVE:
                self._ask_to_yield(line.waiting)
            return
        worker = best if self._warmth is None else self._warmth.warmest(request.digests, best)
        self._dispatch(worker, request)
        self._offer(worker)

    def _prepare(self, request: Request) -> None:
        """What a Router says of ``request``. It knows its prompt, and of its output no more than what is usual."""
        rules = self._rules
        request.yields_left = rules.max_yields
        request.charge = self._charge(request, request.cost)
        if self._warmth is not None:
            request.digests = self._warmth.digests(request)

    def _charge(self, request: Request, cost: int) -> float:
        return charge_of(cost, self._rules.weights.get(request.tenant, 1.0))

    def joined(self, worker: Worker) -> None:
        """``worker`` claims what it has slots for."""
        if self._rules.max_slots is not None or self._rules.affinity:
            bounds = SlotBounds(worker.slots, max(self._rules.max_slots or 0, worker.slots))
            self._readings[worker] = _Reading(bounds, first_state(bounds))
            worker.capacity = bounds.maximum
            self._clock.at(self._clock.now + READ_ENGINE_S, self._read_engine, worker)
        self._claim(worker)

    def left(self, worker: Worker) -> None:
        """``worker`` claims nothing more."""
        self._free.remove(worker)

    def ended(self, request: Request, worker: Worker) -> None:
        """``worker`` has a free slot more."""
        line = self._lines[request.lane]
        line.leased -= 1
        if request.generated == request.output_tokens:
            used = cost_of(Usage(request.prompt_tokens, request.output_tokens, request.cached))
            line.correct(request, self._charge(request, used))
            line.ran(request, self._clock.now)
        if self._yielding is not None:
            self._yielding.ended(request, worker, self._clock.now)
        self._claim(worker)

    def _claim(self, worker: Worker) -> None:
        """``worker`` claims for its free slots."""
        if worker.leaving:
            return
        while worker.running < worker.slots:
            line = next((line for lane in lane_order(worker.turn) if (line := self._lines[lane]).waiting), None)
            if line is None:
                break
            worker.turn += 1
            self._dispatch(worker, line.take(worker, self._clock.now))
        self._offer(worker)

    def _dispatch(self, worker: Worker, request: Request) -> None:
        if self._warmth is not None:
            self._warmth.remember(request.digests, worker)
        if self._yielding is not None:
            self._yielding.started(request, worker, self._clock.now)
        self._lines[request.lane].leased += 1
        self._context.dispatch(worker, request)

    def _offer(self, worker: Worker) -> None:
        """Have new work handed to ``worker`` as long as it has free slots."""
        if worker.running < worker.slots:
            self._free.put(worker, self._sign * LOAD_LEVELS * worker.running // worker.capacity)
        else:
            self._free.remove(worker)

    def _read_engine(self, worker: Worker) -> None:
        """``worker`` reads the load of its engine: its slots and its cache's number follow."""
        if worker.leaving:
            del self._readings[worker]
            return
        self._clock.at(self._clock.now + READ_ENGINE_S, self._read_engine, worker)
        last, busy = self._readings[worker], worker.running
        last.passed += 1
        if not asks_now(last.state, last.bounds, busy=busy, passed=last.passed):
            return
        load, last.passed = worker.engine.load(), 0
        last.age, rises = next_age(last.age, load)
        worker.cache += rises
        if self._rules.max_slots is None:
            return
        last.state = next_state(last.state, last.bounds, load, busy=busy, all_in_use=busy >= worker.slots)
        if last.state.limit != worker.slots:
            worker.slots = last.state.limit
            self._claim(worker)

    def _ask_to_yield(self, waiting: int) -> None:
        asked = None if self._yielding is None else self._yielding.asks(waiting, self._clock.now)
        if asked is not None:
            self._clock.at(self._clock.now + self._context.hop_s, self._may_yield, asked)

    def _may_yield(self, request: Request) -> None:
        if self._yielding is not None and self._yielding.agrees(request, self._clock.now) and request.worker:
            request.worker.engine.abort(request, self._yielded)

    def _yielded(self, request: Request) -> None:
        """``request`` goes on later, behind what it has."""
        request.queued_at = self._clock.now
        self._lines[request.lane].put_again(request)
        self._context.take_back(request)
