"""The failure detector: find dead worker sessions for the acting Manager, and declare them dead in its registry.

A session is checked when the connection that it holds open breaks (:meth:`FailureDetector.check`), when its heartbeats
are overdue, and when another session asks for its worker id. A check probes its health port and, unless the port
answers as this session, pings it through its control stream; :mod:`manager.core.liveness` says what that proves. So a
killed worker is found within a second, where its lease would take far longer. Whatever no check can prove is found by
the lease: renewal counters that stand still (:mod:`manager.shard_sweeps`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from queue_schemas import Control, ControlKind, InferqError, SessionId
from telemetry import get_logger

from .core import Evidence, Liveness, Member, ProbeResult, ProbeStatus, Registry, assess_liveness
from .ports import Clock, QueuePort, WorkerProbe, call_queue
from .settings import ManagerSettings
from .shard_sweeps import ShardSweeps

MAX_PROBES_PER_SWEEP = 16
"""Most workers probed in one sweep: a rack that goes down must not hold the others up."""
_PING_POLL_S = 0.05

log = get_logger(__name__)


class FailureDetector:
    """Checks sessions of ``registry``; the jobs of the dead go to ``shards`` for reclaiming.

    ``changed(worker_id)`` is called when a member's entry has changed.
    """

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        probe: WorkerProbe,
        registry: Registry,
        shards: ShardSweeps,
        changed: Callable[[str], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._probe = probe
        self._registry = registry
        self._shards = shards
        self._changed = changed
        self._clock = clock
        self._checking: set[SessionId] = set()
        self._verifying = asyncio.Lock()

    # Checks

    async def check(self, worker_id: str, session_id: SessionId) -> None:
        """Check a session whose connection broke, and reclaim its jobs if it is certainly dead.

        Raises broker errors. A session that is being checked for this reason is not checked twice at once.
        """
        member = self._registry.find(worker_id)
        if member is None or member.session_id != session_id or not member.verified or session_id in self._checking:
            return
        self._checking.add(session_id)
        try:
            await self._check(member)
            await self._shards.reclaim()
        finally:
            self._checking.discard(session_id)

    async def check_overdue(self) -> None:
        """Check those whose heartbeats are missing, the most silent first."""
        silent_s = 2 * self._settings.heartbeat_interval_ms / 1000
        overdue = self._registry.overdue(self._clock(), silent_s, MAX_PROBES_PER_SWEEP)
        async with asyncio.TaskGroup() as tasks:
            for member in overdue:
                tasks.create_task(self._check(member))

    async def assess(self, member: Member) -> Liveness:
        """Whether the session of ``member`` is alive. Raises broker errors."""
        return await self._assess(member, await self._ask(member))

    def declare_dead(self, session_id: SessionId, cause: str) -> None:
        """Forget the session, and have its jobs reclaimed by the next :meth:`ShardSweeps.reclaim`."""
        member = self._registry.declare_dead(session_id)
        self._shards.add_dead(session_id, member.worker_id if member is not None else "", cause)
        if member is not None:
            self._changed(member.worker_id)

    async def _check(self, member: Member) -> None:
        probe = await self._ask(member)
        if probe.status not in (ProbeStatus.REFUSED, ProbeStatus.OTHER):
            return
        try:
            liveness = await self._assess(member, probe)
        except InferqError as error:
            log.info("worker_check_failed", worker=member.worker_id, error=error.message)
            return
        # Meanwhile it may have been heard, have left, or been declared dead by another check.
        now = self._registry.find(member.worker_id)
        as_before = now is not None and (now.session_id, now.heard_at) == (member.session_id, member.heard_at)
        if liveness is Liveness.DEAD and as_before:
            self.declare_dead(member.session_id, "proven")

    async def _assess(self, member: Member, probe: ProbeResult) -> Liveness:
        has_counter = answered = False
        if probe.status is not ProbeStatus.SAME:
            has_counter, answered = await self._ping(member.session_id)
        # A member that is only in the snapshot was there, and may have left while no Manager acted: it is not fresh.
        fresh = member.heard and self._clock() - member.heard_at < self._settings.unresponsive_after_ms / 1000
        return assess_liveness(
            Evidence(
                probe=probe.status,
                verified=member.verified,
                ping_answered=answered,
                has_counter=has_counter,
                had_counter=member.had_counter or self._shards.was_declared_dead(member.session_id),
                fresh=fresh,
            )
        )

    async def _ask(self, member: Member) -> ProbeResult:
        """Who answers at the member's URL."""
        if not member.url:
            return ProbeResult(ProbeStatus.UNKNOWN)
        return await self._probe.ask(member.url, member.worker_id, member.session_id)

    async def _ping(self, session_id: SessionId) -> tuple[bool, bool]:
        """Whether the session has a renewal counter, and whether it rose within ``ping_timeout_ms`` of a ping: on the
        first reachable shard."""
        limit = self._settings.broker_timeout_ms
        unreachable = self._shards.unreachable
        shard = next((shard for shard in range(self._queue.shards) if shard not in unreachable), 0)
        before = (await call_queue(limit, self._queue.maintenance.renewal_counters(shard))).get(session_id)
        if before is None:
            return False, False
        await call_queue(limit, self._queue.fleet.send_control(session_id, Control(ControlKind.PING), shard))
        give_up_at = self._clock() + self._settings.ping_timeout_ms / 1000
        while self._clock() < give_up_at:
            await asyncio.sleep(_PING_POLL_S)
            counter = (await call_queue(limit, self._queue.maintenance.renewal_counters(shard))).get(session_id)
            if counter != before:
                return counter is not None, counter is not None
        return True, False

    # URLs

    async def verify_urls(self) -> None:
        """Probe the URLs that are not verified yet.

        A worker that dies before its URL was verified once is found by its lease only: so newcomers are verified as
        they come, not at the next sweep.
        """
        async with self._verifying, asyncio.TaskGroup() as tasks:
            for member in self._registry.to_verify(self._clock(), MAX_PROBES_PER_SWEEP):
                tasks.create_task(self._verify(member))

    async def verify_urls_unless_busy(self) -> None:
        """:meth:`verify_urls`, or nothing while it runs: a sweep that waited could watch no renewal counters."""
        if not self._verifying.locked():
            await self.verify_urls()

    async def _verify(self, member: Member) -> None:
        probe = await self._ask(member)
        before = self._registry.find(member.worker_id)
        self._registry.record_probe(member.session_id, probe, self._clock())
        now = self._registry.find(member.worker_id)
        if before is None or now is None or before.visible != now.visible:
            self._changed(member.worker_id)
        if probe.note and probe.note != member.url_note:
            log.warning("worker_url_wrong", worker=member.worker_id, note=probe.note)
