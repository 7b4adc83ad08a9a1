"""The workers of a simulation: started, drained, and paid for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from scheduling.autoscale import Candidate, drain_order

from .clock import Clock
from .engines import Engine, EngineProfile


class Worker:
    """One worker beside its engine. ``running`` are the requests that were sent to it; ``turn`` counts its claims."""

    __slots__ = ("asked_at", "cache", "capacity", "engine", "leaving", "number", "ready", "running", "slots", "turn")

    def __init__(self, number: int, engine: Engine, slots: int, asked_at: float) -> None:
        self.number = number
        self.engine = engine
        self.slots = slots
        self.capacity = slots
        """The most slots that it may have."""
        self.asked_at = asked_at
        self.ready = False
        self.leaving = False
        self.running = 0
        self.turn = 0
        self.cache = 0
        """The number of its engine's prefix cache, which rises as that forgets."""


class Membership(Protocol):
    """Who is told which workers there are."""

    def joined(self, worker: Worker) -> None:
        """It is ready."""

    def left(self, worker: Worker) -> None:
        """It takes nothing new, and ends once it has finished what it runs."""


class Fleet:
    """Workers of one profile. A worker costs its GPUs from the moment it is asked for until it ends."""

    def __init__(
        self,
        clock: Clock,
        profile: EngineProfile,
        make_engine: Callable[[], Engine],
        slots: int,
        membership: Membership,
    ) -> None:
        self._clock = clock
        self._gpus = profile.gpus
        self._make_engine = make_engine
        self._slots = slots
        self._start_s = profile.start_s
        self._members: dict[Worker, None] = {}
        """Those that are not leaving, in the order they were asked for."""
        self._leaving: dict[Worker, None] = {}
        self._spent_s = 0.0
        self._number = 0
        self.peak = 0
        self._membership = membership

    def __len__(self) -> int:
        """Workers that start or take work."""
        return len(self._members)

    def capacity(self) -> tuple[int, int]:
        """Workers that take work, and their slots together."""
        slots = [worker.slots for worker in self._members if worker.ready]
        return len(slots), sum(slots)

    def resize(self, wanted: int, *, at_once: bool = False) -> None:
        """Start workers, or have some leave in the order of :func:`scheduling.autoscale.drain_order`. ``at_once``: they
        are ready without a wait, as those are with which a simulation begins."""
        while len(self._members) < wanted:
            worker = Worker(self._number, self._make_engine(), self._slots, self._clock.now)
            self._number += 1
            self._members[worker] = None
            if at_once or not self._start_s:
                self._is_ready(worker)
            else:
                self._clock.at(self._clock.now + self._start_s, self._is_ready, worker)
        self.peak = max(self.peak, len(self._members) + len(self._leaving))
        surplus = len(self._members) - wanted
        if surplus > 0:
            members = {f"{worker.number}": worker for worker in self._members}
            candidates = (Candidate(name, worker.running, worker.ready) for name, worker in members.items())
            for name in drain_order(candidates)[:surplus]:
                self.drain(members[name])

    def drain(self, worker: Worker) -> None:
        """Have ``worker`` finish what it runs, and end."""
        del self._members[worker]
        self._leaving[worker] = None
        worker.leaving = True
        if worker.ready:
            self._membership.left(worker)
        self.settle(worker)

    def settle(self, worker: Worker) -> None:
        """A request of ``worker`` ended: it ends too, if it was leaving and that was its last."""
        if worker.leaving and not worker.running:
            del self._leaving[worker]
            self._spent_s += self._clock.now - worker.asked_at

    def gpu_hours(self, now: float) -> float:
        """What all workers cost until ``now``."""
        alive = sum(now - worker.asked_at for group in (self._members, self._leaving) for worker in group)
        return (self._spent_s + alive) * self._gpus / 3600

    def _is_ready(self, worker: Worker) -> None:
        if not worker.leaving:
            worker.ready = True
            self._membership.joined(worker)
