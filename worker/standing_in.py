"""Standing in for the Manager while none acts: dead peers' jobs are taken back, and what is due by time happens."""

from __future__ import annotations

import asyncio
import random
from typing import NoReturn

from broker import Broker
from queue_schemas import BrokerUnsuitable, InferqError
from telemetry import get_logger

from .core import StandIn
from .metrics import WorkerMetrics

LOOKS_PER_LEASE = 6
_JITTER = 0.2
"""Workers that started together look one after the other: the first takes back what the others then do not find."""
_REFUSED_PAUSE_S = 300.0

log = get_logger(__name__)


async def stand_in(broker: Broker, metrics: WorkerMetrics, lease_s: float) -> NoReturn:
    """Look after the acting Manager, and do what it would do for jobs in its place, until cancelled.

    That several workers do so at once is harmless: the scripts look again at what they are told.
    """
    state = StandIn(lease_s)
    while True:
        pause = lease_s / LOOKS_PER_LEASE * random.uniform(1 - _JITTER, 1 + _JITTER)
        await asyncio.sleep(pause)
        was_acting = state.acting
        try:
            await _look(broker, metrics, state)
        except BrokerUnsuitable as error:
            log.warning("cannot_stand_in", error=error.message, then="dead peers wait for a Manager")
            state.restart()
            await asyncio.sleep(_REFUSED_PAUSE_S)
        except InferqError as error:
            log.debug("manager_not_looked_after", error=error.message)
            state.restart()
        if state.acting != was_acting:
            log.warning("standing_in" if state.acting else "not_standing_in", acting_manager=not state.acting)


async def _look(broker: Broker, metrics: WorkerMetrics, state: StandIn) -> None:
    now = asyncio.get_running_loop().time
    asked_at = now()
    number = await broker.manager_beat()
    if not state.saw_manager(number, asked_at, now()):
        return
    asked_at = now()
    beats = await broker.beats()
    for incarnation in state.saw_peers(beats, asked_at, now()):
        taken = await broker.reclaim(incarnation)
        metrics.stood_in.inc(taken.requeued + taken.lost)
        log.warning("worker_reclaimed", incarnation=incarnation, requeued=taken.requeued + taken.lost, dead=taken.dead)
    if state.acting:
        await broker.expire()
