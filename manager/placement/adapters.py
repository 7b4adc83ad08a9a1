"""Tell workers which LoRA adapters to hold: one round of :mod:`scheduling.adapters` on the registry and the depths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from queue_schemas import BrokerUnavailable, Control, ControlKind, LaneDepth, Pool, SessionId
from queue_schemas.lanes import Lane
from scheduling.adapters import AdapterWorker, HeldAdapter, assign_adapters
from scheduling.placement import PoolDemand, PoolRules, demand_of
from telemetry import get_logger

from ..core import Member, Registry
from ..metrics import FleetMetrics
from ..ports import Clock, QueuePort, call_queue
from ..settings import ManagerSettings
from .rounds import QueueState, Unserved

RETRY_FAILED_S, MAX_RETRY_FAILED_S = 5.0, 600.0
"""How long a worker is not told again to load an adapter that it could not load: twice as long each time it fails."""
_NO_RULES = PoolRules()

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An adapter that failed on a worker: not asked for ``until`` then, and ``pause_s`` long."""

    until: float
    pause_s: float


class AdapterPlacement:
    """Has the workers of ``registry`` load and unload adapters. ``changed(worker_id)`` is called when a member's entry
    has changed.

    What it remembers beside the registry (loads that failed, when an adapter had jobs) is lost with the term.
    """

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        registry: Registry,
        metrics: FleetMetrics,
        changed: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._timeout_ms = settings.broker_timeout_ms
        self._queue = queue
        self._registry = registry
        self._metrics = metrics
        self._changed = changed
        self._clock = clock
        self._refused: dict[SessionId, dict[str, _Refusal]] = {}
        self._unserved = Unserved()
        self._needed_at: dict[str, float] = {}
        """When each adapter that a worker holds had jobs last."""

    @property
    def is_needed(self) -> bool:
        """Whether a worker could load an adapter."""
        return bool(self._members())

    async def decide(self, queue: QueueState) -> None:
        """Decide, change the registry, and hasten the heartbeats of those who are told something."""
        now = self._clock()
        self._note_failures(now)
        members = self._members()
        workers = [self._worker(member, now) for member in members if member.can_load_adapters]
        demand = self._demand(queue.depths, members, workers, now)
        told = {adapter for worker in workers for adapter in worker.held}
        self._needed_at = {adapter: self._needed_at.get(adapter, now) for adapter in told}
        self._needed_at |= dict.fromkeys(told & demand.keys(), now)
        idle_s = {adapter: now - at for adapter, at in self._needed_at.items()}
        unknown = {adapter for adapter in told if queue.is_away(adapter)}
        told_now: set[SessionId] = set()
        for change in assign_adapters(demand.values(), workers, idle_s, unknown):
            self._registry.tell_adapter(change.worker_id, change.adapter, change.instead_of, now)
            self._metrics.adapters_assigned.inc()
            self._changed(change.worker_id)
            log.info(
                "adapter_assigned",
                worker=change.worker_id,
                adapter=change.adapter,
                instead_of=change.instead_of,
                reason=change.why,
            )
            told_now.add(self._registry.get(change.worker_id).session_id)
        await asyncio.gather(*map(self._hasten, told_now))

    async def _hasten(self, session_id: SessionId) -> None:
        """Have a worker send its heartbeat now, whose answer tells it: it loads an adapter in less time than it would
        wait for the next one."""
        try:
            call = self._queue.fleet.send_control(session_id, Control(ControlKind.PING))
            await call_queue(self._timeout_ms, call)
        except BrokerUnavailable as error:
            log.info("worker_not_hastened", session_id=session_id, error=error.message, then="its next heartbeat does")

    def _members(self) -> list[Member]:
        return [member for member in self._registry.members() if member.is_present and member.adapters.set_name]

    def _demand(
        self,
        depths: Mapping[Pool, Mapping[Lane, LaneDepth]],
        members: list[Member],
        workers: list[AdapterWorker],
        now: float,
    ) -> dict[str, PoolDemand]:
        """The adapters with jobs, of those that a worker could load."""
        sets = {member.adapters.set_name: member.adapters.names for member in members}
        mine = {pool for names in sets.values() for pool in names & depths.keys()}
        held = {adapter for worker in workers for adapter in worker.held}
        waiting = {pool for pool in mine if any(lane.waiting for lane in depths[Pool(pool)].values())}
        self._unserved.note(waiting - held, now)
        return {
            pool: demand_of(pool, depths[Pool(pool)], _NO_RULES, self._unserved.for_s(pool, now))
            for pool in sorted(mine)
        }

    def _worker(self, member: Member, now: float) -> AdapterWorker:
        status = member.status
        listed = set(status.models)
        held = {}
        for adapter, told in member.adapters.told.items():
            # An engine that was started anew has it to load once more.
            is_loaded = told.loaded_at is not None and adapter in listed
            load_s = told.loaded_at - told.told_at if told.loaded_at is not None and is_loaded else None
            held[adapter] = HeldAdapter(now - told.told_at, load_s)
        return AdapterWorker(
            worker_id=member.worker_id,
            loadable=member.adapters.names,
            room=status.adapter_room,
            slots=status.slots,
            running=status.running,
            held=held,
            refused=frozenset(
                name for name, one in self._refused.get(member.session_id, {}).items() if now < one.until
            ),
        )

    def _note_failures(self, now: float) -> None:
        """Ask no longer for what failed, and for a while not again."""
        for member in self._members():
            told, failures = member.adapters.told, member.status.adapter_failures
            for adapter in told.keys() & failures.keys():
                refused = self._refused.setdefault(member.session_id, {})
                before = refused.get(adapter)
                pause_s = RETRY_FAILED_S if before is None else min(2 * before.pause_s, MAX_RETRY_FAILED_S)
                refused[adapter] = _Refusal(now + pause_s, pause_s)
                log.warning(
                    "adapter_not_loaded",
                    worker=member.worker_id,
                    adapter=adapter,
                    error=failures[adapter],
                    again_in_s=pause_s,
                )
                self._registry.untell_adapter(member.worker_id, adapter, now)
                self._changed(member.worker_id)
        self._forget_refusals(now)

    def _forget_refusals(self, now: float) -> None:
        """Those that are over for as long as they may last."""
        for session_id, refused in list(self._refused.items()):
            kept = {name: one for name, one in refused.items() if now < one.until + MAX_RETRY_FAILED_S}
            if kept:
                self._refused[session_id] = kept
            else:
                del self._refused[session_id]
