"""Keep the queue in order: take back jobs of dead workers, expire deadlines, survey what waits, audit counters.

Called by the acting Manager, and by a worker while no Manager acts. Each call goes to one shard, or to all of them,
where a shard that does not answer must not stop the others.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from queue_schemas import BadMessage, SessionId, ShardKeys
from queue_schemas.ids import check_session_id
from telemetry import get_logger

from ..redis.calls import Caller, pairs
from ..redis.server_clock import ServerClocks
from ..redis.shards import answers_of, on_each
from .audit import Auditor
from .stats import Survey

_RECLAIM_STEP = 256
_EXPIRE_STEP = 256
_EXPIRE_STEPS = 32
"""Most calls of one sweep on a shard, made while each meets its limit: a burst is worked off, 8192 jobs a second."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What became of a worker session's jobs. ``lost``: streams that wait for their Routers to resume them."""

    requeued: int = 0
    dead: int = 0
    cancelled: int = 0
    lost: int = 0

    def __add__(self, other: Reclaimed) -> Reclaimed:
        return Reclaimed(
            self.requeued + other.requeued,
            self.dead + other.dead,
            self.cancelled + other.cancelled,
            self.lost + other.lost,
        )


@dataclass(frozen=True, slots=True)
class Expired:
    """What one sweep did: jobs ended because their time ran out, workers woken, kept answers forgotten."""

    expired: int = 0
    woken: int = 0
    forgotten: int = 0

    def __add__(self, other: Expired) -> Expired:
        return Expired(self.expired + other.expired, self.woken + other.woken, self.forgotten + other.forgotten)


class Maintenance:
    """Reclaims and sweeps. ``shard`` None means all of them: their results are added up, and the first error is raised
    once every shard was tried. ``control_read`` is shared with :class:`~broker.operations.workers.Workers`."""

    def __init__(
        self, caller: Caller, keys: Sequence[ShardKeys], control_read: MutableMapping[tuple[int, str], str]
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._control_read = control_read
        self._clock = ServerClocks()
        self._auditor = Auditor(caller)
        self._survey = Survey(caller)

    async def renewal_counters(self, shard: int | None = None) -> dict[SessionId, int]:
        """How often each worker session has renewed its leases. One try."""
        counters: dict[SessionId, int] = {}
        for found in answers_of(await on_each(self._of(shard), self._renewal_counters_on)):
            for session_id, count in found.items():
                counters[session_id] = counters.get(session_id, 0) + count
        return counters

    async def _renewal_counters_on(self, keys: ShardKeys) -> dict[SessionId, int]:
        numbers: dict[SessionId, int] = {}
        for name, number in pairs(await self._caller.once(keys.renewals, "HGETALL", keys.renewals)):
            try:
                numbers[check_session_id(name.decode("utf-8", "replace"))] = int(number)
            except (BadMessage, ValueError) as error:
                log.debug("renewal_counter_unreadable", error=str(error))  # at each sweep: not written by us
        return numbers

    async def reclaim(self, session_id: SessionId, shard: int | None = None) -> Reclaimed:
        """Declare a worker session dead: it is fenced, and its jobs wait again or end."""
        return await self._take_back(session_id, shard, counted=True, reason="its worker was lost")

    async def hand_back(self, session_id: SessionId) -> Reclaimed:
        """Fence a worker session that leaves; its jobs wait again as if never started."""
        return await self._take_back(session_id, None, counted=False, reason="its worker left")

    async def expire(self, shard: int | None = None) -> Expired:
        """The sweep of each second, the next part of the survey of waiting jobs, and of an audit when that is due."""
        return sum(answers_of(await on_each(self._of(shard), self._expire_on)), Expired())

    def _of(self, shard: int | None) -> Sequence[ShardKeys]:
        return self._keys if shard is None else (self._keys[shard],)

    async def _take_back(self, session_id: SessionId, shard: int | None, *, counted: bool, reason: str) -> Reclaimed:
        found = await on_each(
            self._of(shard), lambda keys: self._take_back_on(keys, session_id, counted=counted, reason=reason)
        )
        return sum(answers_of(found), Reclaimed())

    async def _take_back_on(self, keys: ShardKeys, session_id: SessionId, *, counted: bool, reason: str) -> Reclaimed:
        taken, left = Reclaimed(), 1
        while left:
            requeued, dead, cancelled, left, lost = await self._caller.script(
                "reclaim", keys.budget, keys.prefix, session_id, int(counted), _RECLAIM_STEP, reason
            )
            taken += Reclaimed(requeued, dead, cancelled, lost)
        self._control_read.pop((keys.shard, session_id), None)
        return taken

    async def _expire_on(self, keys: ShardKeys) -> Expired:
        swept = Expired()
        for _ in range(_EXPIRE_STEPS):
            expired, woken, forgotten, opened, queue_ms, server_ms, waiting = await self._caller.script(
                "expire", keys.budget, keys.prefix, _EXPIRE_STEP, self._clock.at_least(keys.shard)
            )
            self._clock.saw(keys.shard, queue_ms, server_ms)
            swept += Expired(expired, woken, forgotten)
            if max(expired, forgotten, opened) < _EXPIRE_STEP:
                break
        await self._survey.go_on(keys, waiting, queue_ms)
        await self._auditor.audit_next_part(keys)
        return swept
