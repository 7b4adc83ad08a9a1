"""Who of a pool's workers counts: the driver's list beside the registry's, over time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from queue_schemas import WorkerInfo, WorkerState
from scheduling.autoscale import Candidate

_STARTS_REMEMBERED = 5


@dataclass(frozen=True, slots=True)
class Roll:
    """The workers of a pool at one moment, by id. ``ready`` ones take work, ``starting`` ones do not yet, ``missing``
    ones have not for too long, ``lent`` ones were told to load another model and serve that, ``leaving`` ones drain,
    the ``stuck`` of them for too long. ``foreign`` ones take work and are not the driver's."""

    ready: frozenset[str]
    starting: frozenset[str]
    missing: frozenset[str]
    lent: frozenset[str]
    leaving: frozenset[str]
    foreign: frozenset[str]
    stuck: frozenset[str]
    registered: frozenset[str]
    candidates: tuple[Candidate, ...]
    """Of the ``ready`` and ``starting`` ones."""

    @property
    def size(self) -> int:
        """The workers to count on."""
        return len(self.ready) + len(self.starting) + len(self.foreign)

    @property
    def owned(self) -> frozenset[str]:
        """All that the driver runs."""
        return self.ready | self.starting | self.missing | self.lent | self.leaving

    @property
    def groups(self) -> dict[str, frozenset[str]]:
        """Who is in each state."""
        groups = {"ready": self.ready, "starting": self.starting, "missing": self.missing}
        return groups | {"lent": self.lent, "leaving": self.leaving, "foreign": self.foreign}

    @property
    def counts(self) -> dict[str, int]:
        """How many are in each state."""
        return {state: len(ids) for state, ids in self.groups.items()}


@dataclass(slots=True)
class Roster:
    """Calls the roll of ``pool``. A driver's word alone makes no worker ready: only the registry's does. One that takes
    no work for ``start_timeout_ms`` is missing, whatever the driver says, and one that leaves should be gone within
    ``stop_timeout_ms``."""

    pool: str
    start_timeout_ms: float
    stop_timeout_ms: float
    returns: bool = False
    """Whether a worker that has drained may come back under its id, as a pod does whose container is started again."""
    _leaving: dict[str, float] = field(default_factory=dict)
    _now_ms: float = 0.0
    _idle_since: dict[str, float] = field(default_factory=dict)
    _new: set[str] = field(default_factory=set)
    _seen: set[str] | None = None
    _starts_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_STARTS_REMEMBERED))

    @property
    def start_up_ms(self) -> float:
        """How long the last workers took to start, the median; 0 before the first."""
        return median(self._starts_ms) if self._starts_ms else 0.0

    def let_go(self, worker_ids: Iterable[str]) -> None:
        """These are to leave."""
        for worker_id in worker_ids:
            self._leaving.setdefault(worker_id, self._now_ms)

    def call(self, owned: frozenset[str], workers: Iterable[WorkerInfo], now_ms: float) -> Roll:
        """The roll: ``owned`` by the driver, ``workers`` by the registry."""
        registered = {worker.worker_id: worker for worker in workers}
        serving = {
            worker_id for worker_id, worker in registered.items() if worker.takes_work and self.pool in worker.models
        }
        drained = {
            worker_id for worker_id in owned & registered.keys() if registered[worker_id].state is WorkerState.DRAINING
        }
        self._now_ms = now_ms
        self.let_go(drained)
        still = drained if self.returns else owned
        self._leaving = {worker_id: since for worker_id, since in self._leaving.items() if worker_id in still}
        staying = owned - self._leaving.keys()
        self._time_starts(staying, serving, now_ms)
        ready = staying & serving
        lent = {
            worker_id
            for worker_id in (staying & registered.keys()) - ready
            if registered[worker_id].loadable and registered[worker_id].takes_work
        }
        missing = {
            worker_id
            for worker_id in staying - ready - lent
            if now_ms - self._idle_since[worker_id] >= self.start_timeout_ms
        }
        starting = staying - ready - lent - missing
        candidates = (
            Candidate(worker_id, registered[worker_id].running if worker_id in registered else 0, worker_id in ready)
            for worker_id in sorted(ready | starting)
        )
        return Roll(
            ready=frozenset(ready),
            starting=frozenset(starting),
            missing=frozenset(missing),
            lent=frozenset(lent),
            leaving=frozenset(self._leaving),
            foreign=frozenset(serving - owned),
            stuck=frozenset(one for one, since in self._leaving.items() if now_ms - since >= self.stop_timeout_ms),
            registered=frozenset(registered),
            candidates=tuple(candidates),
        )

    def _time_starts(self, staying: frozenset[str], serving: set[str], now_ms: float) -> None:
        """Since when each worker takes no work; of those that appeared since the first roll, how long until they do."""
        if self._seen is not None:
            self._new |= staying - self._seen
        self._seen = set(staying)
        self._new &= staying
        for worker_id in staying & serving:
            since = self._idle_since.pop(worker_id, None)
            if worker_id in self._new and since is not None:  # not one that was ready when it was first seen
                self._starts_ms.append(now_ms - since)
            self._new.discard(worker_id)
        self._idle_since = {worker_id: self._idle_since.get(worker_id, now_ms) for worker_id in staying - serving}
