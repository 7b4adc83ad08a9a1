import time

import pytest

from broker import Reclaimed
from manager import shard_sweeps
from manager.metrics import FleetMetrics
from manager.shard_sweeps import ShardSweeps
from queue_schemas import SessionId
from telemetry import MetricsRegistry
from telemetry.backoff import Backoff
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeQueue, fast_settings

ONE = SessionId("w.0000000000000001")
CAUSE = "expired lease"
OUTCOMES = ("requeued", "resumable", "dead", "cancelled")


class _Queue(FakeQueue):
    """Each shard has ten jobs of every dead session."""

    async def reclaim(self, session_id: SessionId, shard: int) -> Reclaimed:
        self._trip_on(shard)
        return Reclaimed(requeued=1, lost=4, dead=2, cancelled=3)


async def test_a_session_is_counted_once_and_its_jobs_on_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard is unreachable, so that its jobs are reclaimed in a later pass; streams that Routers resume count."""
    monkeypatch.setattr(shard_sweeps, "_POLL_UNREACHABLE", Backoff(0.01, 0.01))
    registry = MetricsRegistry("manager")
    queue = _Queue(shards=2, away={1})
    sweeps = ShardSweeps(fast_settings(), queue, FleetMetrics(registry), time.monotonic)

    def counted() -> tuple[float | None, list[float | None]]:
        value = registry.collectors.get_sample_value
        return value("inferq_sessions_declared_dead_total", {"cause": CAUSE}), [
            value("inferq_reclaimed_jobs_total", {"outcome": outcome}) for outcome in OUTCOMES
        ]

    try:
        await sweeps.poll()
        for _ in range(2):
            sweeps.add_dead(ONE, "w", CAUSE)
            await sweeps.reclaim()
            assert counted() == (1, [1, 4, 2, 3])
        queue.away.clear()
        await eventually(lambda: not sweeps.unreachable, "the shard is polled again")
        await sweeps.reclaim()
        assert counted() == (1, [2, 8, 4, 6])
    finally:
        sweeps.close()
