"""Workers without a Manager: one of them sweeps for all."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from broker import Broker
from queue_schemas import SessionId, new_session_id
from telemetry import MetricsRegistry
from tests.support.queue import Puller, ServerBackend, make_job
from tests.support.waiting import eventually
from worker.fallback_sweeper import FallbackSweeper
from worker.metrics import WorkerMetrics

LEASE_S = 1.5


async def test_one_worker_at_a_time_sweeps(real_backend: ServerBackend) -> None:
    """[G10] Of five workers without a Manager one reads what all write, takes back what a dead one held and
    sweeps; when it ends, another does."""
    looks: dict[SessionId, int] = {}
    brokers: dict[SessionId, Broker] = {}
    sweeping: dict[SessionId, asyncio.Task[None]] = {}

    async def look_counted(name: SessionId) -> None:
        broker = brokers[name]
        renewal_counters = broker.maintenance.renewal_counters

        async def counting(shard: int) -> dict[SessionId, int]:
            looks[name] += 1
            return await renewal_counters(shard)

        broker.maintenance.renewal_counters = counting  # type: ignore[method-assign]
        await FallbackSweeper(broker, name, WorkerMetrics(MetricsRegistry("worker")), LEASE_S).run()

    for _ in range(5):
        name = new_session_id("w")
        brokers[name], looks[name] = await real_backend.connect(), 0
    first, second = await real_backend.connect(), await real_backend.connect()
    for name in brokers:
        sweeping[name] = asyncio.create_task(look_counted(name))
    dead = await Puller(first).join()
    await first.jobs.enqueue(make_job(max_attempts=3))
    lease = await dead.claim_one()
    heir = await Puller(second).join()
    renewing = asyncio.create_task(_renew(second, heir.session_id))
    again = await eventually(lambda: heir.claim(1), "the dead worker's job is taken back", limit_s=15, every_s=0.1)
    assert again[0].job == lease.job
    (sweeper,) = [name for name, number in looks.items() if number]
    sweeping[sweeper].cancel()
    await eventually(lambda: sum(map(bool, looks.values())) == 2, "another sweeps then", limit_s=15)
    for task in (renewing, *sweeping.values()):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    for broker in (first, second, *brokers.values()):
        await broker.close()


async def _renew(broker: Broker, session_id: SessionId) -> None:
    while True:
        await broker.workers.renew(session_id)
        await asyncio.sleep(LEASE_S / 6)
