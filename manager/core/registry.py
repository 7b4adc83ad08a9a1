"""The registry: the workers of the fleet, their states and assignments, for one term of the acting Manager.

Rules:

* A worker id has one member: one session. Whether a newcomer may take the id of another is decided before
  (:func:`manager.core.liveness.assess_liveness`); here the newcomer replaces it.
* A heartbeat of a session that is not the member's is unknown: the worker registers again.
* So is one of a worker that follows an assignment of this term or a later one which was not given here: a Redis that
  lost its latest writes has given the term out twice. After registering, the worker follows the assignment of the
  answer. No worker's message moves the term: terms come from the queue alone.
* Without a heartbeat for ``unresponsive_s`` a member is unresponsive; the next one clears it. It leaves the
  registry when it deregisters, when its session is declared dead, or when it is unresponsive and has no renewal counter
  for a whole lease.
* Draining is for good: only a new session works again.
* A worker that is told to load a model or adapters keeps to that for its session: what it says of its engine shows how
  far it is.
* A worker whose adapters are not known here registers again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from queue_schemas import (
    Assignment,
    EngineState,
    Heartbeat,
    Registration,
    SessionId,
    UnknownWorker,
    WorkerId,
    WorkerInfo,
    WorkerState,
    WorkerStatus,
)
from queue_schemas.fleet.adapters import adapter_set_of

from .adapters import MemberAdapters
from .assignment import next_assignment, wanted_pools
from .liveness import ProbeResult, ProbeStatus

FIRST_VERIFY_PAUSE_S, MAX_VERIFY_PAUSE_S = 1.0, 60.0
_NO_ASSIGNMENT = Assignment(term=0, version=0)
_NO_ADAPTERS = MemberAdapters()


@dataclass(frozen=True, slots=True)
class Member:
    """One worker. Times are monotonic seconds of the Manager that holds it.

    ``heard_at``: when it registered or sent a heartbeat last; of one that only the snapshot knows, when that was read.
    ``heard``: it did so in this term, so it has an assignment of this term. ``had_counter``: its renewal counter was
    seen, so it has joined the queue. ``verified``: its URL answered as this session. ``verify_at``,
    ``verify_pause_s``: when its unverified URL is tried again, and the pause after that. ``loadable``: models of which
    it may be told to load one; ``load``: the one it was told, empty for none, ``told_at`` then (None: not known).
    ``load_s``: how long that took; None until its engine was ready since.
    """

    worker_id: WorkerId
    status: WorkerStatus
    heard_at: float
    url: str | None = None
    version: str = ""
    region: str = ""
    state: WorkerState = WorkerState.ACTIVE
    drain_asked: bool = False
    had_counter: bool = False
    heard: bool = False
    verified: bool = False
    url_note: str = ""
    verify_at: float = 0.0
    verify_pause_s: float = FIRST_VERIFY_PAUSE_S
    loadable: tuple[str, ...] = ()
    load: str = ""
    told_at: float | None = None
    load_s: float | None = None
    adapters: MemberAdapters = _NO_ADAPTERS
    assignment: Assignment = field(default=_NO_ASSIGNMENT)

    @property
    def session_id(self) -> SessionId:
        return SessionId(self.status.session_id)

    @property
    def model(self) -> str:
        """The model that its engine serves, or will; empty if it could not load another one."""
        return self.load or self.status.loaded

    @property
    def is_swapping(self) -> bool:
        """Whether it was told to load another model than the one that its engine serves or starts with."""
        return self.load not in ("", self.status.loaded)

    @property
    def is_present(self) -> bool:
        """Whether it takes work as soon as its engine is ready."""
        return self.state is WorkerState.ACTIVE and self.status.broker_ok

    @property
    def can_load_adapters(self) -> bool:
        """Whether its engine serves the base model of adapters that it could load."""
        status, adapters = self.status, self.adapters
        serves_base = status.engine is EngineState.READY and not self.is_swapping and status.loaded == adapters.base
        return bool(adapters.names) and serves_base and status.adapter_room > 0

    @property
    def load_failed(self) -> bool:
        """Whether its engine failed before it was ready with its model."""
        return self.load_s is None and self.status.engine is EngineState.FAILED and not self.is_swapping

    @property
    def visible(self) -> tuple[object, ...]:
        """What others act on. How busy a worker is changes with each heartbeat, and is not part of it."""
        status = self.status
        return (
            self.state, self.assignment, self.verified, self.url_note, status.engine, status.engine_detail,
            status.models, status.cards, status.slots, status.broker_ok,
        )  # fmt: skip

    def info(self, now: float | None = None) -> WorkerInfo:
        """The member as others see it; without ``now`` as it is written down, where an age would soon be wrong."""
        status = self.status
        return WorkerInfo(
            worker_id=self.worker_id,
            session_id=status.session_id,
            url=self.url,
            url_note=self.url_note,
            url_verified=self.verified,
            version=self.version,
            region=self.region,
            models=status.models,
            cards=status.cards,
            slots=status.slots,
            running=status.running,
            engine=status.engine,
            engine_detail=status.engine_detail,
            broker_ok=status.broker_ok,
            state=self.state,
            loaded=status.loaded,
            loadable=list(self.loadable),
            adapter_set=self.adapters.set_name,
            adapter_base=self.adapters.base,
            adapter_room=status.adapter_room,
            adapter_failures=status.adapter_failures,
            heartbeat_age_ms=0 if now is None else max(0, round((now - self.heard_at) * 1000)),
            assignment=self.assignment,
        )


class Registry:
    """The members and their assignments, of one term of one acting Manager. Durations in seconds."""

    def __init__(self, term: int, shard_of: Callable[[str], int], *, unresponsive_s: float, lease_s: float) -> None:
        self.term = term
        self._shard_of = shard_of
        self._unresponsive_s = unresponsive_s
        self._lease_s = lease_s
        self._members: dict[WorkerId, Member] = {}
        self._adapter_names: WeakValueDictionary[str, frozenset[str]] = WeakValueDictionary()
        """Of each set that a member could load, once."""

    def load(
        self, snapshot: Iterable[WorkerInfo], now: float, adapter_sets: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """Begin with what the last Manager wrote down. All count as just heard: the next heartbeats decide."""
        adapter_sets = adapter_sets or {}
        for info in snapshot:
            status = WorkerStatus.model_validate(info.model_dump())
            member = Member(
                worker_id=WorkerId(info.worker_id),
                status=status,
                heard_at=now,
                url=info.url,
                version=info.version,
                region=info.region,
                drain_asked=info.state is WorkerState.DRAINING,
                verify_at=now,
                loadable=tuple(info.loadable),
                load=info.assignment.load,
                told_at=now if info.assignment.load else None,
                load_s=0.0 if info.engine is EngineState.READY and not info.is_swapping else None,
                adapters=self._adapters(
                    info.adapter_set, adapter_sets.get(info.adapter_set, ()), info.adapter_base
                ).told_before(info.assignment.adapters or (), info.models, now),
                assignment=info.assignment,
            )
            self._put(member, now)

    def members(self) -> list[Member]:
        """All members, by worker id."""
        return sorted(self._members.values(), key=lambda member: member.worker_id)

    def find(self, worker_id: str) -> Member | None:
        return self._members.get(WorkerId(worker_id))

    def get(self, worker_id: str) -> Member:
        """The member of that id. Raises ``UnknownWorker``."""
        member = self.find(worker_id)
        if member is None:
            raise UnknownWorker(f"no worker {worker_id!r} is registered here: see GET /fabric/v1/workers")
        return member

    def join(self, registration: Registration, now: float) -> Member:
        """Take a worker in, in place of any other session of its id; a known session keeps what it has."""
        worker_id = WorkerId(registration.worker_id)
        known = self._members.get(worker_id)
        member = Member(
            worker_id=worker_id,
            status=registration,
            heard_at=now,
            url=registration.url,
            version=registration.version,
            region=registration.region,
            verify_at=now,
            loadable=tuple(registration.loadable),
            adapters=self._adapters(
                adapter_set_of(registration.adapters), registration.adapters, registration.adapter_base
            ).told_before(registration.models, registration.models, now),
            heard=True,
        )
        if known is not None and known.session_id == member.session_id:
            member = replace(
                member,
                drain_asked=known.drain_asked,
                had_counter=known.had_counter,
                load=known.load,
                told_at=known.told_at,
                load_s=known.load_s,
                adapters=replace(member.adapters, told=known.adapters.told),
                assignment=known.assignment,
            )
            if known.url == member.url:
                member = replace(
                    member,
                    verified=known.verified,
                    url_note=known.url_note,
                    verify_at=known.verify_at,
                    verify_pause_s=known.verify_pause_s,
                )
        return self._put(member, now)

    def heartbeat(self, worker_id: str, heartbeat: Heartbeat, now: float) -> Member:
        """Take a heartbeat in. Raises ``UnknownWorker`` unless this session is the member and follows this
        Manager."""
        member = self.find(worker_id)
        if member is None or member.session_id != heartbeat.session_id:
            raise UnknownWorker(f"worker {worker_id!r} is not registered here in this session: register again")
        if member.adapters.are_unknown:
            raise UnknownWorker(f"the adapters of worker {worker_id!r} are not known here: register again")
        if heartbeat.term > self.term or (heartbeat.term == self.term and not member.heard):
            raise UnknownWorker(f"worker {worker_id!r} follows an assignment of another Manager: register again")
        return self._put(replace(member, status=heartbeat, heard_at=now, heard=True), now)

    def drain(self, worker_id: str, now: float) -> Member:
        """Ask a worker to finish what it runs and end. Raises ``UnknownWorker``."""
        return self._put(replace(self.get(worker_id), drain_asked=True), now)

    def place(self, worker_id: str, model: str, now: float) -> Member:
        """Have a worker load one of its loadable models. Raises ``UnknownWorker``."""
        member = self.get(worker_id)
        return self._put(replace(member, load=model, told_at=now, load_s=None), now)

    def tell_adapter(self, worker_id: str, adapter: str, instead_of: str, now: float) -> None:
        """Have a worker load an adapter, and unload another one if ``instead_of`` names it. Raises
        ``UnknownWorker``."""
        member = self.get(worker_id)
        self._put(replace(member, adapters=member.adapters.tell(adapter, instead_of, now)), now)

    def untell_adapter(self, worker_id: str, adapter: str, now: float) -> None:
        """Ask a worker for an adapter no longer. Raises ``UnknownWorker``."""
        member = self.get(worker_id)
        self._put(replace(member, adapters=member.adapters.without(adapter)), now)

    def adapter_sets(self) -> dict[str, frozenset[str]]:
        """The adapters that members could load, by the names of their sets."""
        all_of_them = (member.adapters for member in self._members.values())
        return {adapters.set_name: adapters.names for adapters in all_of_them if adapters.names}

    def leave(self, worker_id: str, session_id: str) -> bool:
        """Forget a worker that deregisters; False if that session is no member (any more)."""
        member = self.find(worker_id)
        if member is None or member.session_id != session_id:
            return False
        del self._members[member.worker_id]
        return True

    def declare_dead(self, session_id: SessionId) -> Member | None:
        """Forget a session that is dead; the member it was, if any."""
        for member in self._members.values():
            if member.session_id == session_id:
                return self._members.pop(member.worker_id)
        return None

    def saw_counters(self, sessions: Iterable[SessionId]) -> None:
        """These sessions have a renewal counter: they have joined the queue."""
        seen = set(sessions)
        for worker_id, member in self._members.items():
            if not member.had_counter and member.session_id in seen:
                self._members[worker_id] = replace(member, had_counter=True)

    def record_probe(self, session_id: SessionId, probe: ProbeResult, now: float) -> None:
        """Take in a probe of a worker's URL. Only an answer as this very session verifies it."""
        for member in self._members.values():
            if member.session_id == session_id:
                verified = member.verified or probe.status is ProbeStatus.SAME
                self._members[member.worker_id] = replace(
                    member,
                    verified=verified,
                    url_note="" if probe.status is ProbeStatus.SAME else probe.note,
                    verify_at=now + member.verify_pause_s,
                    verify_pause_s=min(member.verify_pause_s * 2, MAX_VERIFY_PAUSE_S),
                )
                return

    def to_verify(self, now: float, limit: int) -> list[Member]:
        """Up to ``limit`` members whose URL is to be verified now, the longest overdue first."""
        due = [m for m in self._members.values() if m.url and not m.verified and m.verify_at <= now]
        return sorted(due, key=lambda member: member.verify_at)[:limit]

    def overdue(self, now: float, silent_s: float, limit: int) -> list[Member]:
        """Up to ``limit`` members not heard for ``silent_s`` whose URL may prove their death, the most silent first."""
        silent = [m for m in self._members.values() if m.verified and now - m.heard_at >= silent_s]
        return sorted(silent, key=lambda member: member.heard_at)[:limit]

    def sweep(self, now: float, has_counter: Callable[[SessionId], bool]) -> list[Member]:
        """Bring every state up to date; returns the members that were removed.

        An unresponsive member without a renewal counter holds no job, so no lease will ever run out for it.
        """
        lost = [
            member
            for member in self._members.values()
            if now - member.heard_at >= self._unresponsive_s + self._lease_s and not has_counter(member.session_id)
        ]
        for member in lost:
            del self._members[member.worker_id]
        for member in list(self._members.values()):
            self._put(member, now)
        return lost

    def _put(self, member: Member, now: float) -> Member:
        state = WorkerState.ACTIVE
        if member.drain_asked or member.status.draining:
            state = WorkerState.DRAINING
        elif now - member.heard_at >= self._unresponsive_s:
            state = WorkerState.UNRESPONSIVE
        status = member.status
        load_s = member.load_s
        if load_s is None and status.engine is EngineState.READY and not member.is_swapping:
            load_s = 0.0 if member.told_at is None else now - member.told_at
        adapters = member.adapters.heard(status, now, is_swapping=member.is_swapping)
        member = replace(member, state=state, load_s=load_s, adapters=adapters)
        if member.assignment.term != self.term or not self._same_inputs(member):
            models = [] if member.is_swapping else adapters.served(status.models)
            pools = wanted_pools(state, status.engine, models, member.assignment.pools, self._shard_of)
            assignment = next_assignment(member.assignment, self.term, pools, member.load, adapters.assigned)
            member = replace(member, assignment=assignment)
        self._members[member.worker_id] = member
        return member

    def _adapters(self, set_name: str, names: Iterable[str], base: str) -> MemberAdapters:
        if not set_name:
            return _NO_ADAPTERS
        known = self._adapter_names.get(set_name) or frozenset(names)
        if known:
            self._adapter_names[set_name] = known
        return MemberAdapters(known, set_name, base)

    def _same_inputs(self, member: Member) -> bool:
        """Whether the assignment that ``member`` has was made from what it says now: most heartbeats change nothing."""
        known = self._members.get(member.worker_id)
        return (
            known is not None
            and known.assignment is member.assignment
            and (known.state, known.status.engine, known.load) == (member.state, member.status.engine, member.load)
            and known.adapters is member.adapters
            and known.status.loaded == member.status.loaded
            and known.status.models == member.status.models
        )
