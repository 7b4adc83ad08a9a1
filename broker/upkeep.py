"""What the acting Manager asks of the queue, and workers that leave or stand in for it: renewal numbers, jobs taken
back, deadlines. Calls on one shard and on all of them: a shard that is away must not stop the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from queue_schemas import BadMessage, Control, InferqError, SessionId, ShardKeys
from queue_schemas.ids import check_session_id
from telemetry import get_logger

from .audits import Audits
from .redis.calls import Caller, pairs
from .redis.server_clock import ServerClocks

_RECLAIM_STEP = 256
_EXPIRE_STEP = 256
_EXPIRE_STEPS = 32
"""Most calls of one sweep on a shard, made while each meets its limit: a burst is worked off, 8192 jobs a second."""

_T = TypeVar("_T")
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What became of the jobs of one session_id. ``lost``: streams that wait for their Routers."""

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


async def on_each(keys: Sequence[ShardKeys], call: Callable[[ShardKeys], Awaitable[_T]]) -> list[_T | InferqError]:
    """The answer of ``call`` for each shard, or its error; all are asked at the same time."""

    async def one(shard: ShardKeys) -> _T | InferqError:
        try:
            return await call(shard)
        except InferqError as error:
            return error

    return await asyncio.gather(*(one(shard) for shard in keys))


def answers_of(found: Sequence[_T | InferqError]) -> list[_T]:
    """The answers of :func:`on_each`; raises the first error, if there is one."""
    for answer in found:
        if isinstance(answer, InferqError):
            raise answer
    return [answer for answer in found if not isinstance(answer, InferqError)]


class UpkeepCalls:
    """The part of :class:`broker.Broker` that keeps the queue in order."""

    _caller: Caller
    _keys: Sequence[ShardKeys]
    _control_read: dict[tuple[int, str], str]
    _clock: ServerClocks
    _audits: Audits

    async def leave(self, session_id: SessionId) -> Reclaimed:
        """Leave the fabric; what is still held is handed back as if never started. Raises once every shard was
        tried."""
        return await self._take_back(session_id, counted=False, reason="its worker left")

    async def beats(self) -> dict[SessionId, int]:
        """Renewal numbers by session id, summed over the shards. One try."""
        numbers: dict[SessionId, int] = {}
        for found in answers_of(await on_each(self._keys, self._beats_on)):
            for session_id, number in found.items():
                numbers[session_id] = numbers.get(session_id, 0) + number
        return numbers

    async def beats_on(self, shard: int) -> dict[SessionId, int]:
        """Renewal numbers by session id on one shard. One try."""
        return await self._beats_on(self._keys[shard])

    async def _beats_on(self, keys: ShardKeys) -> dict[SessionId, int]:
        numbers: dict[SessionId, int] = {}
        for name, number in pairs(await self._caller.once(keys.beats, "HGETALL", keys.beats)):
            try:
                numbers[check_session_id(name.decode("utf-8", "replace"))] = int(number)
            except (BadMessage, ValueError) as error:
                log.debug("beat_unreadable", error=str(error))  # at each sweep: nobody of ours wrote it
        return numbers

    async def send_control(self, session_id: SessionId, control: Control, shard: int = 0) -> bool:
        """Put a message on a worker's control stream of a shard; False if the worker is gone."""
        key = self._keys[shard].control(session_id)
        fields = [part for pair in control.fields().items() for part in pair]
        return await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", *fields) is not None

    async def reclaim(self, session_id: SessionId) -> Reclaimed:
        """Declare an session id dead: it is fenced, and its jobs wait again or end. Raises once every shard was
        tried."""
        return await self._take_back(session_id, counted=True, reason="its worker was lost")

    async def reclaim_on(self, shard: int, session_id: SessionId) -> Reclaimed:
        """:meth:`reclaim` on one shard."""
        return await self._take_back_on(self._keys[shard], session_id, counted=True, reason="its worker was lost")

    async def _take_back(self, session_id: SessionId, *, counted: bool, reason: str) -> Reclaimed:
        found = await on_each(
            self._keys, lambda keys: self._take_back_on(keys, session_id, counted=counted, reason=reason)
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

    async def expire(self) -> Expired:
        """The sweep of each second, on every shard, and a part of its audit when that is due. Raises once every shard
        was tried."""
        return sum(answers_of(await on_each(self._keys, self._expire_on)), Expired())

    async def expire_on(self, shard: int) -> Expired:
        """:meth:`expire` on one shard."""
        return await self._expire_on(self._keys[shard])

    async def _expire_on(self, keys: ShardKeys) -> Expired:
        swept = Expired()
        for _ in range(_EXPIRE_STEPS):
            expired, woken, forgotten, queue_ms, server_ms = await self._caller.script(
                "expire", keys.budget, keys.prefix, _EXPIRE_STEP, self._clock.at_least(keys.shard)
            )
            self._clock.saw(keys.shard, queue_ms, server_ms)
            swept += Expired(expired, woken, forgotten)
            if max(expired, forgotten) < _EXPIRE_STEP:
                break
        await self._audits.go_on(keys)
        return swept
