"""Deaths: examining the doubtful, and taking back what the dead held until that has succeeded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from queue_schemas import BrokerUnavailable, Control, ControlKind, Incarnation, InferqError
from telemetry import get_logger

from .core import Door, DoorState, Evidence, Member, Verdict, judge
from .metrics import FleetMetrics
from .ports import QueuePort, WorkerProbe
from .settings import ManagerSettings

RECLAIMS_AT_ONCE = 16
DEAD_REMEMBERED = 4096
"""How many reclaimed incarnations are known as such, for a worker that comes back under its id."""
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


class Deaths:
    """Judges incarnations and reclaims the dead."""

    def __init__(
        self,
        settings: ManagerSettings,
        queue: QueuePort,
        probe: WorkerProbe,
        metrics: FleetMetrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._probe = probe
        self._metrics = metrics
        self._clock = clock
        self._to_reclaim: dict[Incarnation, str] = {}
        self._dead: dict[Incarnation, None] = {}

    async def look(self, member: Member) -> Door:
        """Who answers at the member's URL."""
        if not member.url:
            return Door(DoorState.UNKNOWN)
        return await self._probe.look(member.url, member.worker_id, member.incarnation)

    async def judge(self, member: Member, door: Door, *, heard: bool) -> Verdict:
        """Ping, unless the door has said enough, and weigh what is known. Raises broker errors.

        ``heard``: this Manager has heard of the member from itself.
        """
        has_number = answered = False
        if door.state is not DoorState.SAME:
            has_number, answered = await self._ping(member.incarnation)
        evidence = Evidence(
            door=door.state,
            verified=member.verified,
            ping_answered=answered,
            has_number=has_number,
            had_number=member.had_number or member.incarnation in self._dead,
            fresh=heard and self._clock() - member.heard_at < self._settings.suspect_ms / 1000,
        )
        return judge(evidence)

    async def _ping(self, incarnation: Incarnation) -> tuple[bool, bool]:
        """Whether the incarnation has a renewal number, and whether it rose within ``ping_ms`` of a ping."""
        limit = self._settings.broker_call_ms
        before = (await within(limit, self._queue.beats())).get(incarnation)
        if before is None:
            return False, False
        await within(limit, self._queue.send_control(incarnation, Control(ControlKind.PING)))
        give_up_at = self._clock() + self._settings.ping_ms / 1000
        while self._clock() < give_up_at:
            await asyncio.sleep(_PING_POLL_S)
            number = (await within(limit, self._queue.beats())).get(incarnation)
            if number != before:
                return number is not None, number is not None
        return True, False

    def note(self, incarnation: Incarnation, worker_id: str, how: str) -> None:
        """An incarnation is dead: what it holds is taken back by :meth:`reclaim`."""
        if incarnation not in self._to_reclaim:
            log.warning("worker_dead", worker=worker_id, incarnation=incarnation, how=how)
            self._to_reclaim[incarnation] = how

    async def reclaim(self) -> None:
        """Take back the jobs of the dead, a few at a time. Raises the first broker error, after trying all of them."""
        some = list(self._to_reclaim.items())[:RECLAIMS_AT_ONCE]
        errors = await asyncio.gather(*(self._reclaim_one(incarnation, how) for incarnation, how in some))
        for error in errors:
            if error is not None:
                raise error

    async def _reclaim_one(self, incarnation: Incarnation, how: str) -> InferqError | None:
        try:
            taken = await within(self._settings.broker_call_ms, self._queue.reclaim(incarnation))
        except InferqError as error:
            return error
        self._to_reclaim.pop(incarnation, None)
        self._dead[incarnation] = None
        while len(self._dead) > DEAD_REMEMBERED:
            del self._dead[next(iter(self._dead))]
        self._metrics.dead(how, taken)
        log.info("worker_reclaimed", incarnation=incarnation, requeued=taken.requeued, dead=taken.dead)
        return None
