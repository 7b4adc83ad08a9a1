"""Replay a trace: requests arrive, a policy sends them to workers, a scaler says how many workers there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .clock import Clock
from .engines import PROFILES, EngineProfile, engine_factory
from .engines.profile import DEFAULT_PROFILE
from .fleet import Fleet, Worker
from .measures import Objectives, Recorder, Summary
from .policies import POLICIES, PolicyContext, QueueRules
from .pool_figures import PoolFigures
from .requests import Request, TraceRequest
from .scaling import FleetLoad, Scaler
from .tenant_shares import WINDOW_S, TenantShares
from .traces import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """One simulation. ``workers`` are ready at its beginning. With inferq's policy, and where ``clairvoyant``, a worker
    runs ``slots`` requests at once. ``hop_s`` is the time from the decision where a request runs until its engine has
    it. ``rules`` are those of inferq's queue.

    ``clairvoyant``: instead of ``workers`` there is always as much of the fleet as has work, without any wait: a bound
    for what scaling can reach. Such a fleet packs its workers.
    """

    policy: str = "inferq"
    workers: int = 4
    slots: int = 32
    profile: EngineProfile = PROFILES[DEFAULT_PROFILE]
    hop_s: float = 0.002
    objectives: Objectives = field(default_factory=Objectives)
    weights: Mapping[str, float] = field(default_factory=dict)
    rules: QueueRules = field(default_factory=QueueRules)
    clairvoyant: bool = False


def simulate(trace: Trace, options: SimulationOptions, scaler: Scaler | None = None) -> Summary:
    """The figures of ``trace`` replayed. Without a ``scaler`` the fleet is fixed. The same arguments give the same
    figures."""
    return _Simulation(trace, options, scaler).run()


class _Simulation:
    """Implements :class:`simulator.engines.EngineListener`."""

    def __init__(self, trace: Trace, options: SimulationOptions, scaler: Scaler | None) -> None:
        kind = POLICIES[options.policy]
        self._clock = clock = Clock()
        self._scaler = scaler
        self._pulls = kind.has_slots
        self._clairvoyant = options.clairvoyant
        self._hop_s = options.hop_s
        self._lines: Iterator[TraceRequest] = iter(trace.requests())
        self._arrived = self._open = 0
        self._figures = PoolFigures()
        self._is_over = False
        self._ended_at = 0.0
        self._shares = TenantShares(options.weights)
        self._recorder = Recorder(options.objectives)
        context = PolicyContext(clock, self._dispatch, self._take_back, options.hop_s, trace.block_tokens)
        self._policy = kind.make(context, replace(options.rules, packs=options.clairvoyant, weights=options.weights))
        engines = engine_factory(clock, options.profile, trace.block_tokens, self, shared_cache=kind.shared_cache)
        slots = options.slots if kind.has_slots or options.clairvoyant else options.profile.max_seqs
        self._fleet = Fleet(clock, options.profile, engines, slots, self._policy)
        self._fleet.resize(0 if options.clairvoyant else options.workers, at_once=True)

    def run(self) -> Summary:
        """Everything from the first request to the last answer."""
        self._await_next(None)
        if self._scaler is not None:
            self._clock.at(0.0, self._scale, self._scaler)
        self._clock.at(WINDOW_S, self._close_window)
        self._clock.run()
        return self._recorder.summary(
            gpu_hours=self._fleet.gpu_hours(self._ended_at),
            peak_workers=self._fleet.peak,
            fairness=self._shares.fairness(),
            lasted_s=self._ended_at,
        )

    def started(self, request: Request) -> None:
        """``request`` left its engine's own queue."""
        self._figures.started(request, self._clock.now)
        if request.started_at < 0:
            request.started_at = self._clock.now
            self._shares.started(request)

    def finished(self, request: Request) -> None:
        """``request`` has its last token."""
        self._figures.finished(request, self._clock.now)
        self._recorder.finished(request, self._clock.now)
        self._shares.finished(request)
        self._ended(request)

    def refused(self, request: Request) -> None:
        """``request`` is longer than the engine's KV cache."""
        self._recorder.failed(request)
        self._figures.failed(request)
        self._shares.failed(request)
        self._ended(request)

    def _await_next(self, line: TraceRequest | None) -> None:
        """``line`` arrives now, and the one behind it at its time."""
        following = next(self._lines, None)
        if following is None:
            self._is_over = True
        else:
            self._clock.at(following.at_s, self._await_next, following)
        if line is None:
            return
        request = Request(self._arrived, line, self._clock.now)
        self._arrived += 1
        self._open += 1
        self._figures.arrived(request)
        self._shares.arrived(request)
        self._policy.arrive(request)
        if self._clairvoyant and self._policy.waiting:
            self._fleet.resize(len(self._fleet) + 1, at_once=True)

    def _dispatch(self, worker: Worker, request: Request) -> None:
        worker.running += 1
        request.worker = worker
        request.began_at = self._clock.now
        if self._pulls:
            self._figures.started(request, self._clock.now)
        self._clock.at(self._clock.now + self._hop_s, worker.engine.submit, request)

    def _ended(self, request: Request) -> None:
        self._open -= 1
        self._ended_at = self._clock.now
        self._leave_worker(request)
        if self._is_over and not self._open:
            self._clock.stop()

    def _take_back(self, request: Request) -> None:
        """``request`` waits again."""
        self._figures.interrupted(request)
        self._leave_worker(request)

    def _leave_worker(self, request: Request) -> None:
        worker, request.worker = request.worker, None
        if worker is None:
            return
        worker.running -= 1
        self._policy.ended(request, worker)
        if worker.leaving:
            self._fleet.settle(worker)
        elif self._clairvoyant and not worker.running:
            self._fleet.drain(worker)

    def _scale(self, scaler: Scaler) -> None:
        pool = self._figures.depth(self._clock.now, *self._fleet.capacity())
        self._fleet.resize(scaler.wanted(FleetLoad(self._clock.now, pool, len(self._fleet))))
        self._clock.at(self._clock.now + scaler.interval_s, self._scale, scaler)

    def _close_window(self, _: None) -> None:
        self._shares.close_window()
        self._clock.at(self._clock.now + WINDOW_S, self._close_window)
