"""The fallback sweeper: while no Manager acts, one worker reclaims dead peers' jobs and ends jobs past their deadline.

That worker holds the sweeper's lease in Redis; the others watch that lease and the acting Manager's.
"""

from __future__ import annotations

import asyncio
import random
from typing import NoReturn

from broker import Broker
from queue_schemas import BrokerUnsuitable, InferqError, SessionId
from telemetry import get_logger

from .core import FallbackWatch
from .metrics import WorkerMetrics

POLLS_PER_LEASE = 6
_JITTER = 0.2
_REFUSED_PAUSE_S = 300.0
_SHARD_TIMEOUT_S = 2.0
"""Limit on the calls to one shard in one round: an unreachable shard must not stop the others."""

log = get_logger(__name__)


class FallbackSweeper:
    """Watches the acting Manager for the session ``session_id``, and takes its place for what cannot wait."""

    def __init__(self, broker: Broker, session_id: SessionId, metrics: WorkerMetrics, lease_s: float) -> None:
        self._broker = broker
        self._session_id = session_id
        self._metrics = metrics
        self._lease_s = lease_s
        self._watch = FallbackWatch(lease_s, broker.shards)
        self._holds_lease = False
        """Whether this worker holds the sweeper's lease, as far as it knows."""

    async def run(self) -> NoReturn:
        """Watch, and sweep while no Manager acts, until cancelled."""
        watch = self._watch
        while True:
            await asyncio.sleep(self._lease_s / POLLS_PER_LEASE * random.uniform(1 - _JITTER, 1 + _JITTER))
            was_sweeping = self._sweeping
            try:
                await self._round()
            except BrokerUnsuitable as error:
                log.warning("fallback_sweep_refused", error=error.message, then="dead peers wait for a Manager")
                watch.restart()
                await asyncio.sleep(_REFUSED_PAUSE_S)
            except InferqError as error:
                log.debug("acting_manager_not_polled", error=error.message)
                watch.restart()
            if self._sweeping != was_sweeping:
                event = "fallback_sweep_started" if self._sweeping else "fallback_sweep_ended"
                log.warning(event, acting_manager=not watch.manager_absent)

    @property
    def _sweeping(self) -> bool:
        return self._watch.manager_absent and self._holds_lease

    async def _round(self) -> None:
        now = asyncio.get_running_loop().time
        asked_at = now()
        lease_until = await self._broker.fleet.leader_lease_until()
        if not self._watch.saw_manager(lease_until, asked_at, now()):
            if self._holds_lease:
                self._holds_lease = False
                await self._broker.fleet.acquire_sweeper_lease(self._session_id, 0)
            return
        held = self._holds_lease
        # Held over two rounds that were missed; only its holder reads the renewal counters of all workers.
        ttl_ms = round(self._lease_s * 1000 / 2)
        self._holds_lease = await self._broker.fleet.acquire_sweeper_lease(self._session_id, ttl_ms)
        if not self._holds_lease:
            if held:
                self._watch.forget_peers()
            return
        await asyncio.gather(*(self._poll_peers(shard) for shard in range(self._broker.shards)))
        dead = self._watch.dead_peers()
        await asyncio.gather(*(self._sweep(shard, dead) for shard in range(self._broker.shards)))

    async def _poll_peers(self, shard: int) -> None:
        now = asyncio.get_running_loop().time
        asked_at = now()
        try:
            async with asyncio.timeout(_SHARD_TIMEOUT_S):
                counters = await self._broker.maintenance.renewal_counters(shard)
        except (InferqError, TimeoutError) as error:
            log.debug("shard_not_polled", shard=shard, error=str(error))
            self._watch.mark_shard_unreachable(shard)
        else:
            self._watch.saw_peers(counters, asked_at, now(), shard)

    async def _sweep(self, shard: int, dead: list[SessionId]) -> None:
        """Reclaim and expire on one shard. What fails is done in the next round: it is still due then."""
        try:
            async with asyncio.timeout(_SHARD_TIMEOUT_S):
                for session_id in dead:
                    reclaimed = await self._broker.maintenance.reclaim(session_id, shard)
                    requeued = reclaimed.requeued + reclaimed.lost
                    self._metrics.fallback_reclaimed.inc(requeued)
                    log.warning("session_reclaimed", session_id=session_id, requeued=requeued, dead=reclaimed.dead)
                if self._watch.manager_absent:
                    await self._broker.maintenance.expire(shard)
        except (InferqError, TimeoutError) as error:
            log.debug("shard_not_swept", shard=shard, error=str(error))
