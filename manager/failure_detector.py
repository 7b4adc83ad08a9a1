"""FailureDetector: examining the doubtful, and taking back what the dead held until that has succeeded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from broker import Reclaimed
from queue_schemas import BrokerUnavailable, Control, ControlKind, InferqError, SessionId
from telemetry import get_logger

from .core import Door, DoorState, Evidence, Member, Verdict, judge
from .metrics import FleetMetrics
from .ports import QueuePort, WorkerProbe
from .settings import ManagerSettings

RECLAIMS_AT_ONCE = 16
DEAD_REMEMBERED = 4096
"""How many reclaimed sessions are known as such, for a worker that comes back under its id."""
_PING_POLL_S = 0.05

Clock = Callable[[], float]
_T = TypeVar("_T")
log = get_logger(__name__)


async def within(limit_ms: int, call: Awaitable[_T]) -> _T:
    """The answer of a broker call; ``BrokerUnavailable`` if it takes longer than ``limit_ms``."""
    try:
        async with asyncio.timeout(limit_ms / 1000):
            return await call
    except TimeoutError as error:
        raise BrokerUnavailable(f"the queue's Redis did not answer within {limit_ms} ms", retry_after_s=2) from error


class FailureDetector:
    """Judges sessions and reclaims the dead."""

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        probe: WorkerProbe,
        metrics: FleetMetrics,
        clock: Clock = time.monotonic,
        away: Callable[[], set[int]] = set,
    ) -> None:
        """``away``: the shards that do not answer now."""
        self._away = away
        self._settings = settings
        self._queue = queue
        self._probe = probe
        self._metrics = metrics
        self._clock = clock
        self._to_reclaim: dict[SessionId, _Dead] = {}
        self._dead: dict[SessionId, None] = {}

    async def look(self, member: Member) -> Door:
        """Who answers at the member's URL."""
        if not member.url:
            return Door(DoorState.UNKNOWN)
        return await self._probe.look(member.url, member.worker_id, member.session_id)

    async def judge(self, member: Member, door: Door, *, heard: bool) -> Verdict:
        """Ping, unless the door has said enough, and weigh what is known. Raises broker errors.

        ``heard``: this Manager has heard of the member from itself.
        """
        has_number = answered = False
        if door.state is not DoorState.SAME:
            has_number, answered = await self._ping(member.session_id)
        evidence = Evidence(
            door=door.state,
            verified=member.verified,
            ping_answered=answered,
            has_number=has_number,
            had_number=member.had_number or member.session_id in self._dead,
            fresh=heard and self._clock() - member.heard_at < self._settings.suspect_ms / 1000,
        )
        return judge(evidence)

    async def _ping(self, session_id: SessionId) -> tuple[bool, bool]:
        """Whether the session id has a renewal number, and whether it rose within ``ping_ms`` of a ping: on the first
        shard that is not away."""
        limit = self._settings.broker_call_ms
        away = self._away()
        shard = next((shard for shard in range(self._queue.shards) if shard not in away), 0)
        before = (await within(limit, self._queue.maintenance.renewal_counters(shard))).get(session_id)
        if before is None:
            return False, False
        await within(limit, self._queue.fleet.send_control(session_id, Control(ControlKind.PING), shard))
        give_up_at = self._clock() + self._settings.ping_ms / 1000
        while self._clock() < give_up_at:
            await asyncio.sleep(_PING_POLL_S)
            number = (await within(limit, self._queue.maintenance.renewal_counters(shard))).get(session_id)
            if number != before:
                return number is not None, number is not None
        return True, False

    def note(self, session_id: SessionId, worker_id: str, how: str) -> None:
        """An session id is dead: what it holds is taken back by :meth:`reclaim`."""
        if session_id not in self._to_reclaim:
            log.warning("worker_dead", worker=worker_id, session_id=session_id, how=how)
            self._to_reclaim[session_id] = _Dead(how, set(range(self._queue.shards)))

    async def reclaim(self) -> None:
        """Take back the jobs of the dead, a few at a time, on every shard that is not away; on those that are, once
        they are back. Raises the first broker error, after trying all of them."""
        away = self._away()
        due = [(session_id, dead) for session_id, dead in self._to_reclaim.items() if dead.shards - away]
        errors = await asyncio.gather(
            *(self._reclaim_one(session_id, dead, away) for session_id, dead in due[:RECLAIMS_AT_ONCE])
        )
        for error in errors:
            if error is not None:
                raise error

    async def _reclaim_one(self, session_id: SessionId, dead: _Dead, away: set[int]) -> InferqError | None:
        failures: list[InferqError] = []

        async def on(shard: int) -> None:
            try:
                dead.taken += await within(
                    self._settings.broker_call_ms, self._queue.maintenance.reclaim(session_id, shard)
                )
            except InferqError as error:
                failures.append(error)
            else:
                dead.shards.discard(shard)

        await asyncio.gather(*(on(shard) for shard in sorted(dead.shards - away)))
        if failures:
            return failures[0]
        if not dead.shards:
            self._to_reclaim.pop(session_id, None)
        self._dead[session_id] = None
        while len(self._dead) > DEAD_REMEMBERED:
            del self._dead[next(iter(self._dead))]
        self._metrics.dead(dead.how, dead.taken)
        log.info("worker_reclaimed", session_id=session_id, requeued=dead.taken.requeued, dead=dead.taken.dead)
        dead.taken = Reclaimed()
        return None


@dataclass(slots=True)
class _Dead:
    """How a death was found, the shards where its jobs are still to be taken back, and what was taken and not told."""

    how: str
    shards: set[int]
    taken: Reclaimed = field(default_factory=Reclaimed)
