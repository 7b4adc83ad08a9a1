"""Standing in for the Manager while none acts: dead peers' jobs are taken back, and what is due by time happens.

One worker at a time does so, which holds a lease for it in Redis; the others look after that lease and the Manager's.
"""

from __future__ import annotations

import asyncio
import random
from typing import NoReturn

from broker import Broker
from queue_schemas import BrokerUnsuitable, InferqError, SessionId
from telemetry import get_logger

from .core import FallbackSweep
from .metrics import WorkerMetrics

LOOKS_PER_LEASE = 6
_JITTER = 0.2
_REFUSED_PAUSE_S = 300.0
_SHARD_LIMIT_S = 2.0
"""Limit on what is asked of one shard in one look: a shard that is away must not stop the others."""

log = get_logger(__name__)


async def stand_in(broker: Broker, worker: SessionId, metrics: WorkerMetrics, lease_s: float) -> NoReturn:
    """Look after the acting Manager, and do what it would do for jobs in its place, until cancelled."""
    await _StandingIn(broker, worker, metrics, lease_s).run()


class _StandingIn:
    def __init__(self, broker: Broker, worker: SessionId, metrics: WorkerMetrics, lease_s: float) -> None:
        self._broker = broker
        self._worker = worker
        self._metrics = metrics
        self._lease_s = lease_s
        self._state = FallbackSweep(lease_s, broker.shards)
        self._sweeps = False
        """Whether this worker holds the sweeper's lease, as far as it knows."""

    async def run(self) -> NoReturn:
        state = self._state
        while True:
            await asyncio.sleep(self._lease_s / LOOKS_PER_LEASE * random.uniform(1 - _JITTER, 1 + _JITTER))
            was_acting = state.acting and self._sweeps
            try:
                await self._look()
            except BrokerUnsuitable as error:
                log.warning("cannot_stand_in", error=error.message, then="dead peers wait for a Manager")
                state.restart()
                await asyncio.sleep(_REFUSED_PAUSE_S)
            except InferqError as error:
                log.debug("manager_not_looked_after", error=error.message)
                state.restart()
            acting = state.acting and self._sweeps
            if acting != was_acting:
                log.warning("standing_in" if acting else "not_standing_in", acting_manager=not state.acting)

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time
        asked_at = now()
        number = await self._broker.fleet.leader_lease_until()
        if not self._state.saw_manager(number, asked_at, now()):
            if self._sweeps:
                self._sweeps = False
                await self._broker.fleet.acquire_sweeper_lease(self._worker, 0)
            return
        held = self._sweeps
        # Held over two looks that were missed; only its holder reads what all workers write.
        self._sweeps = await self._broker.fleet.acquire_sweeper_lease(self._worker, round(self._lease_s * 1000 / 2))
        if not self._sweeps:
            if held:
                self._state.forget_peers()
            return
        await asyncio.gather(*(self._observe(shard) for shard in range(self._broker.shards)))
        dead = self._state.dead_peers()
        await asyncio.gather(*(self._take_back(shard, dead) for shard in range(self._broker.shards)))

    async def _observe(self, shard: int) -> None:
        now = asyncio.get_running_loop().time
        asked_at = now()
        try:
            async with asyncio.timeout(_SHARD_LIMIT_S):
                numbers = await self._broker.maintenance.renewal_counters(shard)
        except (InferqError, TimeoutError) as error:
            log.debug("shard_not_looked_after", shard=shard, error=str(error))
            self._state.shard_away(shard)
        else:
            self._state.saw_peers(numbers, asked_at, now(), shard)

    async def _take_back(self, shard: int, dead: list[SessionId]) -> None:
        """What is due on one shard. What fails is done at the next look: it is still due then."""
        try:
            async with asyncio.timeout(_SHARD_LIMIT_S):
                for session_id in dead:
                    taken = await self._broker.maintenance.reclaim(session_id, shard)
                    requeued = taken.requeued + taken.lost
                    self._metrics.stood_in.inc(requeued)
                    log.warning("worker_reclaimed", session_id=session_id, requeued=requeued, dead=taken.dead)
                if self._state.acting:
                    await self._broker.maintenance.expire(shard)
        except (InferqError, TimeoutError) as error:
            log.debug("shard_not_swept", shard=shard, error=str(error))
